"""A headless Chromium, steered by its own protocol over a web socket."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from contextlib import asynccontextmanager

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Tab:
    """One page."""

    def __init__(self, socket):
        self.socket, self.number, self.problems = socket, 0, []

    async def call(self, method, **params):
        self.number += 1
        number = self.number
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            told = json.loads((await self.socket.receive(timeout=60)).data)
            if told.get("method") == "Runtime.exceptionThrown":
                self.problems.append(told["params"]["exceptionDetails"].get("exception", {}).get("description"))
            if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.problems.append(told["params"]["entry"]["text"])
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]

    async def run(self, code):
        """The value of a JavaScript expression, awaited."""
        found = await self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, code, seconds=60):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not await self.run(code):
            assert time.monotonic() < end, f"never true: {code}"
            await asyncio.sleep(0.1)

    async def press(self, key, **more):
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    async def type(self, text):
        await self.call("Input.insertText", text=text)

    async def look(self, width, height, *, dark=False, phone=False):
        """Set the size of the window and the colours."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        scheme = "dark" if dark else "light"
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def picture(self, path):
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def tab(folder, address):
    """A page that shows `address`; the browser ends with the block."""
    aiohttp = __import__("aiohttp")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--remote-debugging-port=0", "--no-first-run", f"--user-data-dir={folder}/profile", "about:blank"]
    with open(folder / "chromium.log", "w") as log:
        browser = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        place, end = folder / "profile" / "DevToolsActivePort", time.monotonic() + 60
        while not (place.exists() and place.read_text().strip()):
            assert time.monotonic() < end, (folder / "chromium.log").read_text()
            assert browser.poll() is None, (folder / "chromium.log").read_text()
            await asyncio.sleep(0.1)
        port = place.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                target = next(each for each in await reply.json() if each["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=2**28) as socket:
                found = Tab(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await found.call(f"{domain}.enable")
                await found.call("Page.navigate", url=address)
                yield found
    finally:
        browser.terminate()
        browser.wait(30)
