/* A closed-loop load generator: N connections, each sends a request as soon as its last one was answered.
 *
 *   load -p PORT [-u PATH] [-k KEY] [-b BODY] [-e ENDING] [-c CONNECTIONS] [-s SECONDS]
 *
 * Speaks just enough HTTP/1.1 (keep-alive, Content-Length and chunked answers). An empty KEY sends no Authorization.
 * An answer counts only if its status is 200 and it is complete; a streamed one must have a line that begins with
 * ENDING, by default "data: [DONE]". Prints one JSON line: `ok`, `errors`,
 * `events` (lines that begin with "data:"), `seconds`, and in µs from the request's send: `p50`, `p99` to the last
 * byte, `first_p50`, `first_p99` to the first. The first error is shown on stderr. One thread, one epoll loop.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 1 << 14, READ_BYTES = 1 << 16, EVENTS_PER_WAIT = 256, GRACE_US = 10000000, LINE_BYTES = 64 };

typedef enum { HEAD, SIZED, CHUNK_SIZE, CHUNK, CHUNK_END, LAST_CHUNK } Part;

typedef struct {
    int fd;
    bool waiting; /* a request is out */
    bool used;    /* an answer came over it */
    uint64_t sent_at, first_byte_at;
    /* where in the answer we are */
    Part part;
    char head[HEAD_BYTES + 1];
    int head_length;
    int status;
    bool closes;
    long left;      /* bytes to go in this part; for CHUNK_SIZE the size read so far */
    bool extension; /* past the digits of a chunk's size line */
    /* the event stream in it */
    char line[LINE_BYTES];
    int line_length; /* counted on beyond what `line` holds */
    long events;
    bool streamed, done;
} Connection;

typedef struct {
    uint32_t *values;
    long count, room;
} Samples;

static const char *ending = "data: [DONE]";
static int ending_length;
static int port, epoll;
static char *request;
static size_t request_length;
static Samples total_us, first_us;
static long ok, errors, events;

static uint64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* --- samples --------------------------------------------------------------------------------------------- */

static void keep(Samples *samples, uint64_t value) {
    if (samples->count == samples->room) {
        samples->room = samples->room ? samples->room * 2 : 1 << 16;
        samples->values = realloc(samples->values, (size_t)samples->room * sizeof(uint32_t));
    }
    samples->values[samples->count++] = (uint32_t)value;
}

static int by_size(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

static void sort(Samples *samples) {
    if (samples->count) qsort(samples->values, (size_t)samples->count, sizeof(uint32_t), by_size);
}

static uint32_t percentile(const Samples *sorted, int percent) {
    return sorted->count ? sorted->values[(sorted->count - 1) * percent / 100] : 0;
}

/* --- sending --------------------------------------------------------------------------------------------- */

static void dial(Connection *connection) {
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    connection->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof address)) {
        perror("connect");
        exit(1);
    }
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event interest = {.events = EPOLLIN, .data.ptr = connection};
    epoll_ctl(epoll, EPOLL_CTL_ADD, connection->fd, &interest);
    connection->waiting = connection->used = false;
}

static void redial(Connection *connection) {
    close(connection->fd);
    dial(connection);
}

static void ask(Connection *connection) {
    connection->part = HEAD;
    connection->head_length = connection->line_length = 0;
    connection->events = 0;
    connection->streamed = connection->done = false;
    connection->first_byte_at = 0;
    connection->waiting = true;
    connection->sent_at = now_us();
    /* A failed send shows as a closed connection at the next read, and is counted there. */
    (void)!send(connection->fd, request, request_length, MSG_NOSIGNAL);
}

/* --- receiving ------------------------------------------------------------------------------------------- */

/* Counts events; lines may be cut anywhere between two reads. */
static void read_events(Connection *connection, const char *bytes, long length) {
    while (length > 0) {
        const char *newline = memchr(bytes, '\n', (size_t)length);
        long piece = newline ? newline - bytes : length;
        long room = (long)sizeof connection->line - connection->line_length;
        if (room > 0) memcpy(connection->line + connection->line_length, bytes, (size_t)(piece < room ? piece : room));
        connection->line_length += (int)piece;
        if (!newline) return;
        if (connection->line_length >= 5 && !memcmp(connection->line, "data:", 5)) {
            connection->events++;
            if (connection->line_length >= ending_length && !memcmp(connection->line, ending, (size_t)ending_length))
                connection->done = true;
        }
        connection->line_length = 0;
        bytes = newline + 1;
        length -= piece + 1;
    }
}

/* Collects the head; once it is whole, decides how the body ends. Returns how many bytes belonged to the head. */
static long read_head(Connection *connection, const char *bytes, long length) {
    long before = connection->head_length;
    long taken = length < HEAD_BYTES - before ? length : HEAD_BYTES - before;
    memcpy(connection->head + before, bytes, (size_t)taken);
    connection->head_length += (int)taken;
    connection->head[connection->head_length] = 0;
    char *end = strstr(connection->head, "\r\n\r\n");
    if (!end) return taken ? taken : length; /* an endless head never completes, and counts as an error */
    end[2] = 0;
    connection->status = atoi(connection->head + strlen("HTTP/1.1 "));
    connection->closes = strcasestr(connection->head, "\r\nconnection: close") != NULL;
    connection->streamed = strcasestr(connection->head, "\r\ncontent-type: text/event-stream") != NULL;
    const char *size = strcasestr(connection->head, "\r\ncontent-length:");
    connection->part = size ? SIZED : CHUNK_SIZE;
    connection->left = size ? atol(size + strlen("\r\ncontent-length:")) : 0;
    connection->extension = false;
    end[2] = '\r';
    return end + 4 - connection->head - before;
}

/* Reads a chunk's size line. Returns how many bytes belonged to it. */
static long read_chunk_size(Connection *connection, const char *bytes, long length) {
    for (long i = 0; i < length; i++) {
        char c = bytes[i];
        if (c == '\n') {
            connection->part = connection->left ? CHUNK : LAST_CHUNK;
            if (!connection->left) connection->left = 2; /* no trailers are expected: CR LF */
            return i + 1;
        }
        if (c == ';' || c == '\r') connection->extension = true;
        if (connection->extension) continue;
        connection->left = connection->left * 16 + (c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return length;
}

/* Follows the answer through the bytes that came. True: it is complete. */
static bool read_answer(Connection *connection, const char *bytes, long length) {
    while (length > 0) {
        long taken = length < connection->left ? length : connection->left;
        switch (connection->part) {
        case HEAD:
            taken = read_head(connection, bytes, length);
            if (connection->part == SIZED && !connection->left) return true;
            break;
        case CHUNK_SIZE:
            taken = read_chunk_size(connection, bytes, length);
            break;
        case SIZED:
        case LAST_CHUNK:
            connection->left -= taken;
            if (!connection->left) return true;
            break;
        case CHUNK:
            read_events(connection, bytes, taken);
            connection->left -= taken;
            if (!connection->left) {
                connection->part = CHUNK_END;
                connection->left = 2;
            }
            break;
        case CHUNK_END:
            connection->left -= taken;
            if (!connection->left) {
                connection->part = CHUNK_SIZE;
                connection->extension = false;
            }
            break;
        }
        bytes += taken;
        length -= taken;
    }
    return false;
}

static void count_error(const Connection *connection, const char *why) {
    if (!errors++) fprintf(stderr, "first error: %s; the answer began:\n%s\n", why, connection->head);
}

static void count_answer(Connection *connection) {
    uint64_t now = now_us();
    connection->waiting = false;
    connection->used = true;
    if (connection->status != 200) count_error(connection, "status is not 200");
    else if (connection->streamed && !connection->done) count_error(connection, "the stream ended without its last event");
    else {
        ok++;
        events += connection->events;
        keep(&total_us, now - connection->sent_at);
        keep(&first_us, connection->first_byte_at - connection->sent_at);
    }
}

static void receive(Connection *connection) {
    static char bytes[READ_BYTES];
    ssize_t length = read(connection->fd, bytes, sizeof bytes);
    if (length <= 0) {
        if (connection->waiting && connection->used && !connection->first_byte_at) {
            /* Closed after the last answer without a word: any client asks again on a new one. */
            redial(connection);
            ask(connection);
            return;
        }
        if (connection->waiting) {
            connection->head[connection->head_length] = 0;
            count_error(connection, "the connection broke");
        }
        redial(connection);
        return;
    }
    if (!connection->waiting) return;
    if (!connection->first_byte_at) connection->first_byte_at = now_us();
    if (!read_answer(connection, bytes, length)) return;
    count_answer(connection);
    if (connection->closes) redial(connection);
}

int main(int count, char **arguments) {
    const char *path = "/v1/completions", *key = "none", *body = "{}";
    int connection_count = 32, option;
    double seconds = 2;
    while ((option = getopt(count, arguments, "p:u:k:b:e:c:s:")) != -1) {
        if (option == 'p') port = atoi(optarg);
        else if (option == 'u') path = optarg;
        else if (option == 'k') key = optarg;
        else if (option == 'b') body = optarg;
        else if (option == 'e') ending = optarg;
        else if (option == 'c') connection_count = atoi(optarg);
        else if (option == 's') seconds = atof(optarg);
        else return 2;
    }
    ending_length = (int)strlen(ending);
    if (port < 1 || connection_count < 1 || ending_length > LINE_BYTES) return 2;
    signal(SIGPIPE, SIG_IGN);
    request_length = (size_t)asprintf(&request,
                                      "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                                      "%s%s%sContent-Length: %zu\r\n\r\n%s",
                                      path, port, *key ? "Authorization: Bearer " : "", key, *key ? "\r\n" : "",
                                      strlen(body), body);
    epoll = epoll_create1(0);
    Connection *connections = calloc((size_t)connection_count, sizeof(Connection));
    for (int i = 0; i < connection_count; i++) dial(&connections[i]);

    uint64_t start = now_us(), end = start + (uint64_t)(seconds * 1e6);
    for (int i = 0; i < connection_count; i++) ask(&connections[i]);
    for (int running = connection_count; running && now_us() < end + GRACE_US;) {
        struct epoll_event ready[EVENTS_PER_WAIT];
        int readable = epoll_wait(epoll, ready, EVENTS_PER_WAIT, 100);
        bool over = now_us() >= end;
        for (int i = 0; i < readable; i++) {
            Connection *connection = ready[i].data.ptr;
            bool was_waiting = connection->waiting;
            receive(connection);
            if (connection->waiting) continue;
            if (!over) ask(connection);
            else if (was_waiting) running--;
        }
    }
    double elapsed = (double)(now_us() - start) / 1e6;
    for (int i = 0; i < connection_count; i++)
        if (connections[i].waiting) count_error(&connections[i], "no complete answer in time");
    sort(&total_us);
    sort(&first_us);
    printf("{\"ok\":%ld,\"errors\":%ld,\"events\":%ld,\"seconds\":%.4f,\"p50\":%u,\"p99\":%u,"
           "\"first_p50\":%u,\"first_p99\":%u}\n",
           ok, errors, events, elapsed, percentile(&total_us, 50), percentile(&total_us, 99),
           percentile(&first_us, 50), percentile(&first_us, 99));
    return 0;
}
