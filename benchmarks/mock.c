/* An upstream that costs next to nothing, so that what is measured is what stands in front of it.
 *
 *   mock [-p PORT] [-n CHUNKS] [-w EVENTS_PER_WRITE]
 *
 * It answers every POST in the format that its path asks for: OpenAI's chat (/chat/completions), Anthropic's Messages
 * (/messages), and OpenAI's completions everywhere else. The answer is a fixed JSON document of about 500 bytes or,
 * where the body says "stream": true, a burst of CHUNKS text chunks and what the format puts before and after them.
 * All formats say the same text in the same pieces. In a burst every event is an HTTP chunk and, unless -w says
 * otherwise, a write of its own: nothing is paced, and several streams take turns. It listens on loopback and prints
 * "port N" once it accepts. One thread, one epoll loop.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 4096, REQUEST_BYTES = 1 << 16, EVENT_BYTES = 768, EVENTS_PER_WAIT = 256, PROMPT_TOKENS = 12 };

/* An answer, rendered once at the start. Piece i lies between bounds[i] and bounds[i + 1]; a turn sends one. */
typedef struct {
    char *bytes;
    int *bounds;
    int pieces;
} Answer;

typedef struct {
    int fd;
    char request[REQUEST_BYTES + 1];
    int received;
    const Answer *answer; /* what is being sent; NULL while a request is awaited */
    int piece;            /* the next piece of it */
    int offset;           /* bytes of that piece already sent */
} Connection;

/* One upstream's way to say it. The events stand there as they are sent, without chunks of HTTP. */
typedef struct {
    const char *path_end;
    const char *blocking;
    const char *opening[4]; /* events before the text */
    const char *piece;      /* an event of text; %02d is its number */
    const char *ending[4];  /* events after the text; %d in them is the number of pieces, then that and the prompt's */
    Answer whole, streamed;
} Format;

static Connection *connections[MAX_CONNECTIONS]; /* by file descriptor */

#define TEXT                                                                                          \
    "The quick brown fox jumps over the lazy dog while the band plays on and the rain keeps falling " \
    "over the quiet harbour town, where sailors tell long stories about distant shores."

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* --- the answers ----------------------------------------------------------------------------------------- */

#define COMPLETIONS_HEAD                                                                                  \
    "{\"id\":\"cmpl-0123456789abcdef0123456789\",\"object\":\"text_completion\",\"created\":1760000000,"   \
    "\"model\":\"mock-model\","
#define CHAT_HEAD(OBJECT)                                                                                 \
    "{\"id\":\"chatcmpl-0123456789abcdef0123456789\",\"object\":\"" OBJECT "\",\"created\":1760000000,"    \
    "\"model\":\"mock-model\",\"system_fingerprint\":null,"
#define CHAT_CHUNK "data: " CHAT_HEAD("chat.completion.chunk")
#define OPENAI_USAGE                                                                                      \
    "\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":40,\"total_tokens\":52,"                       \
    "\"prompt_tokens_details\":{\"cached_tokens\":0}}}"
#define OPENAI_LAST_USAGE "\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":%d,\"total_tokens\":%d}}\n\n"
#define DONE "data: [DONE]\n\n"
#define MESSAGE_HEAD                                                                                      \
    "\"id\":\"msg_0123456789abcdef01234567\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"mock-model\","
#define ANTHROPIC_INPUT "\"input_tokens\":12,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":0,"

/* The last takes every other path. */
static Format formats[] = {
    {
        .path_end = "/chat/completions",
        .blocking = CHAT_HEAD("chat.completion") "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
                    "\"content\":\"" TEXT "\",\"refusal\":null},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                    OPENAI_USAGE,
        .opening = {CHAT_CHUNK "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
                    "\"logprobs\":null,\"finish_reason\":null}]}\n\n"},
        .piece = CHAT_CHUNK "\"choices\":[{\"index\":0,\"delta\":{\"content\":\" w%02d\"},"
                 "\"logprobs\":null,\"finish_reason\":null}]}\n\n",
        .ending = {CHAT_CHUNK "\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,"
                   "\"finish_reason\":\"stop\"}]}\n\n",
                   CHAT_CHUNK "\"choices\":[]," OPENAI_LAST_USAGE, DONE},
    },
    {
        .path_end = "/messages",
        .blocking = "{" MESSAGE_HEAD "\"content\":[{\"type\":\"text\",\"text\":\"" TEXT "\"}],"
                    "\"stop_reason\":\"end_turn\",\"stop_sequence\":null,"
                    "\"usage\":{" ANTHROPIC_INPUT "\"output_tokens\":40,\"service_tier\":\"standard\"}}",
        .opening = {"event: message_start\n"
                    "data: {\"type\":\"message_start\",\"message\":{" MESSAGE_HEAD "\"content\":[],"
                    "\"stop_reason\":null,\"stop_sequence\":null,"
                    "\"usage\":{" ANTHROPIC_INPUT "\"output_tokens\":1,\"service_tier\":\"standard\"}}}\n\n",
                    "event: content_block_start\n"
                    "data: {\"type\":\"content_block_start\",\"index\":0,"
                    "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
                    "event: ping\ndata: {\"type\":\"ping\"}\n\n"},
        .piece = "event: content_block_delta\n"
                 "data: {\"type\":\"content_block_delta\",\"index\":0,"
                 "\"delta\":{\"type\":\"text_delta\",\"text\":\" w%02d\"}}\n\n",
        .ending = {"event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n",
                   "event: message_delta\n"
                   "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\","
                   "\"stop_sequence\":null},\"usage\":{" ANTHROPIC_INPUT "\"output_tokens\":%d}}\n\n",
                   "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"},
    },
    {
        .path_end = "",
        .blocking = COMPLETIONS_HEAD "\"choices\":[{\"index\":0,\"text\":\"" TEXT "\",\"logprobs\":null,"
                    "\"finish_reason\":\"stop\"}]," OPENAI_USAGE,
        .piece = "data: " COMPLETIONS_HEAD
                 "\"choices\":[{\"index\":0,\"text\":\" w%02d\",\"logprobs\":null,\"finish_reason\":null}]}\n\n",
        .ending = {"data: " COMPLETIONS_HEAD
                   "\"choices\":[{\"index\":0,\"text\":\"\",\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n",
                   "data: " COMPLETIONS_HEAD "\"choices\":[]," OPENAI_LAST_USAGE, DONE},
    },
};
enum { FORMATS = sizeof formats / sizeof *formats };

static void render_blocking(Format *format) {
    Answer *answer = &format->whole;
    answer->bounds = calloc(2, sizeof(int));
    answer->bounds[1] = asprintf(
        &answer->bytes, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
        strlen(format->blocking), format->blocking);
    answer->pieces = 1;
}

/* Writes one event as an HTTP chunk, with this number where it has one; returns its length. */
static int render_event(char *out, const char *event, int number) {
    char text[EVENT_BYTES];
    int length = snprintf(text, sizeof text, event, number, PROMPT_TOKENS + number);
    return sprintf(out, "%x\r\n%s\r\n", (unsigned)length, text);
}

static void render_stream(Format *format, int chunks, int events_per_write) {
    Answer *answer = &format->streamed;
    answer->bytes = malloc((size_t)(chunks + 10) * EVENT_BYTES);
    answer->bounds = calloc((size_t)chunks + 10, sizeof(int));
    answer->pieces = 1;
    /* The head is piece 0: a server sends it as soon as it knows that it will stream. */
    int length = sprintf(answer->bytes, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                                        "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n");
    answer->bounds[1] = length;
    /* What stands before the text leaves a real server together, and so do the ends of a stream. */
    for (int i = 0; i < 4 && format->opening[i]; i++)
        length += render_event(answer->bytes + length, format->opening[i], 0);
    if (format->opening[0]) answer->bounds[++answer->pieces] = length;
    for (int i = 0; i < chunks; i++) {
        length += render_event(answer->bytes + length, format->piece, i % 100);
        if ((i + 1) % events_per_write == 0 || i + 1 == chunks) answer->bounds[++answer->pieces] = length;
    }
    for (int i = 0; i < 4 && format->ending[i]; i++)
        length += render_event(answer->bytes + length, format->ending[i], chunks);
    length += sprintf(answer->bytes + length, "0\r\n\r\n");
    answer->bounds[++answer->pieces] = length;
}

static Format *format_for(const char *request) {
    const char *end = strstr(request, " HTTP/");
    for (int i = 0; end && i < FORMATS - 1; i++) {
        size_t length = strlen(formats[i].path_end);
        if ((size_t)(end - request) >= length && !memcmp(end - length, formats[i].path_end, length)) return &formats[i];
    }
    return &formats[FORMATS - 1];
}

/* --- connections ----------------------------------------------------------------------------------------- */

static void hang_up(Connection *connection) {
    connections[connection->fd] = NULL;
    close(connection->fd);
    free(connection);
}

/* Takes one complete request off the buffer and chooses its answer. False: the request is not understood. */
static bool take_request(Connection *connection) {
    char *request = connection->request;
    request[connection->received] = 0;
    char *end_of_head = strstr(request, "\r\n\r\n");
    if (!end_of_head) return connection->received < REQUEST_BYTES;
    *end_of_head = 0;
    char *header = strcasestr(request, "\r\ncontent-length:");
    *end_of_head = '\r';
    if (!header) return false;
    char *body = end_of_head + 4;
    long length = atol(header + strlen("\r\ncontent-length:"));
    if (length < 0 || body - request + length > REQUEST_BYTES) return false;
    if (connection->received < body - request + length) return true;

    char after = body[length];
    body[length] = 0;
    bool streamed = strstr(body, "\"stream\":true") || strstr(body, "\"stream\": true");
    body[length] = after;
    Format *format = format_for(request);
    connection->received -= (int)(body - request + length);
    memmove(request, body + length, (size_t)connection->received);
    connection->answer = streamed ? &format->streamed : &format->whole;
    connection->piece = connection->offset = 0;
    return true;
}

/* Sends the next piece of the answer, or what is left of it. False: the connection is broken. */
static bool send_piece(Connection *connection) {
    const Answer *answer = connection->answer;
    int start = answer->bounds[connection->piece] + connection->offset;
    int end = answer->bounds[connection->piece + 1];
    ssize_t sent = send(connection->fd, answer->bytes + start, (size_t)(end - start), MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN; /* the next turn tries again */
    connection->offset += (int)sent;
    if (start + sent < end) return true;
    connection->offset = 0;
    if (++connection->piece < answer->pieces) return true;
    connection->answer = NULL;
    return take_request(connection); /* a pipelined one may be waiting */
}

static bool receive(Connection *connection) {
    ssize_t received = read(connection->fd, connection->request + connection->received,
                            (size_t)(REQUEST_BYTES - connection->received));
    if (received <= 0) return received < 0 && errno == EAGAIN;
    connection->received += (int)received;
    if (connection->answer) return true;
    if (!take_request(connection)) return false;
    return !connection->answer || send_piece(connection);
}

static void accept_all(int listener, int epoll) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_CONNECTIONS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        connections[fd] = malloc(sizeof(Connection));
        connections[fd]->fd = fd;
        connections[fd]->received = 0;
        connections[fd]->answer = NULL;
        struct epoll_event interest = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &interest);
    }
}

static int listen_on(int port) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 1024)) fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int main(int count, char **arguments) {
    int port = 0, chunks = 100, events_per_write = 1, option;
    while ((option = getopt(count, arguments, "p:n:w:")) != -1) {
        if (option == 'p') port = atoi(optarg);
        else if (option == 'n') chunks = atoi(optarg);
        else if (option == 'w') events_per_write = atoi(optarg);
        else return 2;
    }
    if (chunks < 1 || events_per_write < 1) return 2;
    signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < FORMATS; i++) {
        render_blocking(&formats[i]);
        render_stream(&formats[i], chunks, events_per_write);
    }
    int listener = listen_on(port);
    int epoll = epoll_create1(0);
    struct epoll_event interest = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &interest);

    bool sending = false; /* some stream has more to say, so do not sleep */
    for (;;) {
        struct epoll_event ready[EVENTS_PER_WAIT];
        int events = epoll_wait(epoll, ready, EVENTS_PER_WAIT, sending ? 0 : -1);
        for (int i = 0; i < events; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) accept_all(listener, epoll);
            else if (connections[fd] && !receive(connections[fd])) hang_up(connections[fd]);
        }
        sending = false;
        for (int fd = 0; fd < MAX_CONNECTIONS; fd++) {
            if (!connections[fd] || !connections[fd]->answer) continue;
            if (!send_piece(connections[fd])) hang_up(connections[fd]);
            else if (connections[fd]->answer) sending = true;
        }
    }
}
