// Server-sent events read from a fetch() body. EventSource cannot POST, so the little format is parsed here.

/** The stream said something that is not an event, or ended without its last event. */
export class BrokenStream extends Error {}

/** Yields the JSON of each event's data. An unfinished last event is no event; comments (keep-alives) are skipped. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split(/\n\n|\r\n\r\n|\r\r/);
      text = blocks.pop();
      for (const block of blocks) {
        const data = dataOf(block);
        if (data !== "") yield parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already; then there is nothing to close
  }
}

function dataOf(block) {
  return block
    .split(/\r\n|\n|\r/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(line[5] === " " ? 6 : 5))
    .join("\n");
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new BrokenStream("The stream held something that could not be read.");
  }
}
