"""An upstream that answers every completion at once, for the proxy's benchmark.

``python -m examples.scripts.benchmark.mock_upstream PORT``: HTTP/1.1 with keep-alive on loopback.
The answer's ``usage.prompt_tokens`` is the number of bytes of the request's body.
"""

from __future__ import annotations

import asyncio
import re
import sys

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            found = _LENGTH.search(head)
            size = int(found[1]) if found else 0
            await reader.readexactly(size)
            body = (
                b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"mock","choices":'
                b'[{"index":0,"text":"x","logprobs":null,"finish_reason":"stop"}],'
                b'"usage":{"prompt_tokens":%d,"completion_tokens":1,"total_tokens":%d}}'
                % (size, size + 1)
            )
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(body)
                + body
            )
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def serve(port: int) -> None:
    """Serve until cancelled."""
    server = await asyncio.start_server(_serve, "127.0.0.1", port, limit=1 << 26)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
