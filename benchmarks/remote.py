"""Images a second from a web server that answers late, beside one that answers at once, and a local folder.

Loads what `extract` loads, without a network behind it: read, hash, decode, resize. The last row is `extract` itself,
with the default network. The servers run in processes of their own on this machine, so their work counts in the rates,
too, and know ranges. The images are the same for all sources. The share is what the late server reaches of the other.

    python benchmarks/remote.py [--images 2000] [--delay 0.05] [--source FOLDER]
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import click
from aiohttp import web
from rich.console import Console
from rich.table import Table

from pipeline.extract import extract
from pipeline.images.loader import load_images
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.spec import Preprocessing

RULE = Preprocessing((224, 224), 256, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
BATCH = 8


class Server:
    """A web server on this machine that serves a folder, with pages that list it, from a thread of its own.

    Parameters
    ----------
    folder : Path
    delay : float, default 0
        Seconds before each answer.
    ranges : bool, default True
        Whether it answers requests for a part with the part; else with all.
    fault : callable, optional
        Called with the path of each request; it returns the status to refuse with, ``"cut"`` to break off in the
        middle of the answer, or None.

    Attributes
    ----------
    url : str
        Without a slash at the end.
    requests : list of (str, str, str)
        Method, path and range of each request so far.
    """

    def __init__(
        self,
        folder: Path,
        delay: float = 0.0,
        *,
        ranges: bool = True,
        fault: Callable[[str], int | str | None] = lambda path: None,
    ) -> None:
        self.folder, self.delay, self.ranges, self.fault = folder, delay, ranges, fault
        self.requests: list[tuple[str, str, str]] = []
        self.url = ""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        runner = web.AppRunner(self._app(), handle_signals=False, shutdown_timeout=0.1)

        async def start() -> None:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)  # HEAD, too
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["path"]
        self.requests.append((request.method, name, request.headers.get("Range", "")))
        await asyncio.sleep(self.delay)
        fault = self.fault(name)
        if isinstance(fault, int):
            return web.Response(status=fault)
        path = self.folder / name
        if path.is_dir():
            links = (
                f'<a href="{quote(one.name)}{"/" * one.is_dir()}">{escape(one.name)}</a>' for one in path.iterdir()
            )
            return web.Response(text="<br>".join(links), content_type="text/html")
        if not path.is_file():
            return web.Response(status=404)
        size, status, headers = path.stat().st_size, 200, {"ETag": f'"{path.stat().st_mtime_ns:x}"'}
        start, stop = 0, size
        if self.ranges:
            headers["Accept-Ranges"] = "bytes"
            if "Range" in request.headers:
                part = request.http_range
                status, start, stop = 206, part.start or 0, min(size, part.stop or size)
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if fault == "cut":
            response = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            if request.transport is not None:
                request.transport.abort()
            return response
        return web.Response(body=data, status=status, headers=headers)


@contextmanager
def server_process(folder: Path, delay: float) -> Iterator[str]:
    """Run a `Server` in a process of its own, which leaves this process its lock; yield its URL."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(folder, delay, there), daemon=True)
    process.start()
    yield here.recv()
    process.terminate()
    process.join()


def _serve(folder: Path, delay: float, pipe: Any) -> None:
    with Server(folder, delay) as server:
        pipe.send(server.url)
        time.sleep(1e6)


def pack(source: ImageSource, count: int, folder: Path) -> None:
    """Write some images of a source as a folder, a manifest, a shard, a zip archive and a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    items = source.items[:: max(1, len(source.items) // count)][:count]
    images = {f"{number:06d}{Path(item.uri).suffix}": source.read(item) for number, item in enumerate(items)}
    (folder / "photos").mkdir()
    for name, data in images.items():
        (folder / "photos" / name).write_bytes(data)
    (folder / "list.csv").write_text("path\n" + "".join(f"photos/{name}\n" for name in images))
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    for name, mode in (("photos.tar", "w:"), ("photos.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as shard:  # type: ignore[call-overload]  # its modes are literals
            shard.add(folder / "photos", "photos")
    pq.write_table(pa.table({"image": [*images.values()]}), folder / "photos.parquet", row_group_size=100)


def rate(source: ImageSource) -> tuple[float, float]:
    """Return how many images a second are loaded, and the milliseconds of CPU time that each takes."""
    began, spent, count = time.perf_counter(), time.process_time(), 0
    for batch in load_images(source, range(len(source.items)), [RULE], BATCH):
        count += len(batch)
    return count / (time.perf_counter() - began), 1000 * (time.process_time() - spent) / count


@click.command(help=__doc__)
@click.option("--images", default=2000, show_default=True, help="Images that are loaded.")
@click.option("--delay", default=0.05, show_default=True, help="Seconds before each answer.")
@click.option("--source", "photos", type=click.Path(path_type=Path), help="Images to take; made by default.")
def main(images: int, delay: float, photos: Path | None) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pack(open_source(photos) if photos else made(images), images, folder)
        late = f"at {1000 * delay:g} ms"
        table = Table("source", f"listed {late}, s", "local images/s", "CPU ms", "at 0 ms", late, "CPU ms", "share")
        rate(open_source(folder / "photos"))  # warm
        with server_process(folder, 0) as quick, server_process(folder, delay) as url:
            for name in ("photos", "list.csv", "photos.tar", "photos.tar.gz", "photos.zip", "photos.parquet"):
                local, local_cpu = rate(open_source(folder / name))
                at_once, _ = rate(open_source(f"{quick}/{name}"))
                began = time.perf_counter()
                source = open_source(f"{url}/{name}")
                listed = time.perf_counter() - began
                remote, remote_cpu = rate(source)
                numbers = f"{local:,.0f}", f"{local_cpu:.2f}", f"{at_once:,.0f}", f"{remote:,.0f}", f"{remote_cpu:.2f}"
                table.add_row(name, f"{listed:.2f}", *numbers, f"{remote / at_once:.0%}")
            places = (folder / "photos", f"{quick}/photos", f"{url}/photos")
            rates = [extract(str(place), output=folder / str(n))[0].images_per_second for n, place in enumerate(places)]
            local, at_once, remote = rates
            shown = f"{local:,.0f}", "", f"{at_once:,.0f}", f"{remote:,.0f}", "", f"{remote / at_once:.0%}"
            table.add_row("photos, extract", "", *shown)
        Console(width=120).print(table)


def made(count: int) -> ImageSource:
    """Return JPEGs of 500×375 pixels, all different."""
    import io

    import numpy as np
    from PIL import Image

    from pipeline.images.sources.items import Item, build_source

    generator = np.random.default_rng(0)

    def read(item: Item) -> bytes:
        small = generator.integers(0, 256, (12, 16, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        return stream.getvalue()

    return build_source("made", "made", [(Item(f"{number}.jpg"), "") for number in range(count)], read)


if __name__ == "__main__":
    main()
