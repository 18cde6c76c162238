"""The demo's API, called with gradio_client from another process than the server's."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import io
import json
import re
import struct
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from app_server import ROOT, new_client
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from jsonschema import Draft202012Validator
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from safetensors.torch import load_file, save_file

PHOTO = ROOT / "examples" / "eileen_collins.jpg"


@pytest.fixture
def app(smiling_app):
    return smiling_app


@pytest.fixture(scope="module")
def client(smiling_app, tmp_path_factory):
    return new_client(smiling_app, tmp_path_factory.mktemp("downloads"))


def invert(client, photo=PHOTO, **options):
    job = client.submit(handle_file(photo), api_name="/invert", **{"steps": 1, **options})
    results = list(job)
    # Iterating ends without a word where a run has failed.
    job.result()
    return results


def upload(app, path):
    """Path on the server of an uploaded file."""
    with open(path, "rb") as file:
        return httpx.post(f"{app.url}gradio_api/upload", files={"files": file}, timeout=60).json()[0]


@pytest.fixture(scope="module")
def results(client):
    return invert(client, steps=3)


@pytest.fixture(scope="module")
def inversion(results):
    return results[-1][2]


@pytest.fixture(scope="module")
def inverter(smiling_folder):
    from metaaux import MetaAuxInverter

    return MetaAuxInverter.from_pretrained(smiling_folder)


def same(path, image):
    return np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(image))


class TestEndpoints:
    def test_they_explain_themselves(self, client):
        endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
        assert set(endpoints) == {"/invert", "/render", "/turntable", "/orbit", "/mesh", "/directions"}
        for name, endpoint in endpoints.items():
            assert len(endpoint["description"]) > 30, name
            for parameter in endpoint["parameters"]:
                needed = parameter["parameter_name"] in ("photo", "inversion")
                assert needed or parameter["parameter_has_default"], (name, parameter)

    def test_invert_yields_steps_plus_two_results(self, results, inverter):
        assert [report["step"] for _, report, _, _ in results] == [-1, 0, 1, 2, 3]
        assert [path is not None for _, _, path, _ in results] == [False, False, False, False, True]
        image, report, path, aligned = results[-1]
        loaded = inverter.load_inversion(path)
        assert [step["step"] for step in loaded.steps] == [-1, 0, 1, 2, 3]
        assert {"mse", "perceptual", "identity", "total", "seconds"} <= set(report)
        assert abs(report["camera"]["yaw"]) < 10 and report["faces_found"] == [1]
        assert same(aligned, loaded.aligned.permute(1, 2, 0).numpy())
        assert same(image, inverter.render(loaded))

    def test_several_photos(self, client):
        with Image.open(PHOTO) as photo:
            mirrored = Path(client.output_dir) / "mirrored.png"
            photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
        outcome = invert(client, steps=0, more_photos=[handle_file(mirrored)])
        assert len(outcome) == 2 and len(outcome[-1][1]["faces_found"]) == 2

    def test_render(self, client, inversion, inverter):
        loaded = inverter.load_inversion(inversion)
        plain = client.predict(handle_file(inversion), api_name="/render")
        turned = client.predict(handle_file(inversion), yaw=20, pitch=-5, api_name="/render")
        edited = client.predict(handle_file(inversion), edits={"smile": 1.5}, api_name="/render")
        assert same(plain, inverter.render(loaded))
        assert same(turned, inverter.render(loaded, yaw=20, pitch=-5))
        assert same(edited, inverter.render(loaded, edits={"smile": 1.5})) and not same(edited, Image.open(plain))

    def test_orbit(self, client, inversion):
        import imageio_ffmpeg

        video = client.predict(handle_file(inversion), frames=12, api_name="/orbit")
        frames, seconds = imageio_ffmpeg.count_frames_and_secs(video)
        assert frames == 12 and seconds == pytest.approx(0.4, abs=0.05)

    def test_turntable(self, client, inversion):
        picture, angles = client.predict(handle_file(inversion), api_name="/turntable")
        size = angles["size"]
        with Image.open(picture) as grid:
            assert grid.size == (size * len(angles["yaws"]), size * len(angles["pitches"])) and size == 32
            for column, row in ((0, 0), (20, 3), (30, 5)):
                view = grid.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
                pose = {"yaw": angles["yaws"][column], "pitch": angles["pitches"][row]}
                rendered = Image.open(client.predict(handle_file(inversion), **pose, api_name="/render"))
                difference = np.subtract(view.convert("RGB"), rendered.convert("RGB"), dtype=float)
                assert np.abs(difference).mean() <= 2

    def test_turntable_of_ones_own_angles(self, client, inversion):
        options = {"yaws": [-10, 20.5], "pitches": [5], "size": 16, "edits": {"smile": 1.0}}
        picture, angles = client.predict(handle_file(inversion), **options, api_name="/turntable")
        assert angles == {"yaws": [-10.0, 20.5], "pitches": [5.0], "size": 16}
        with Image.open(picture) as grid:
            assert grid.size == (32, 16)

    def test_mesh(self, client, inversion):
        import trimesh

        try:
            mesh = trimesh.load(client.predict(handle_file(inversion), resolution=32, api_name="/mesh"), force="mesh")
        except AppError as error:
            # Weights are random: a head may have no surface, which is an answer too.
            assert "no surface" in str(error)
        else:
            assert len(mesh.faces) > 0 and mesh.visual.uv.shape == (len(mesh.vertices), 2)
            assert min(mesh.visual.material.baseColorTexture.size) >= 512

    def test_directions(self, client):
        (smile,) = client.predict(api_name="/directions")
        assert smile["name"] == "smile" and (smile["low"], smile["high"]) == (-3, 3)

    def test_documented_example_runs(self, app, tmp_path, monkeypatch):
        blocks = re.findall(
            r"^```python\n(.*?)^```", (ROOT / "docs/deploying.md").read_text(), re.MULTILINE | re.DOTALL
        )
        (block,) = [block for block in blocks if "gradio_client" in block]
        code = block.replace("http://127.0.0.1:7860", app.url).replace('"photo.jpg"', repr(str(PHOTO)))
        assert code.count(app.url) == 1 and str(PHOTO) in code
        # The model of this test has but one direction.
        code = re.sub(r"edits=\{.*?\}", 'edits={"smile": 1.0}', code)
        monkeypatch.chdir(tmp_path)
        exec(compile(code, "deploying.md", "exec"), {})


class TestMcp:
    """The tools, used as an assistant does, with the protocol's own client."""

    TOOLS = {"invert", "render", "turntable", "orbit", "mesh", "directions"}

    @pytest.fixture
    def use(self, app):
        """Runs a function of a session."""

        def use(function):
            async def run():
                async with (
                    streamable_http_client(f"{app.url}gradio_api/mcp/") as (read, write, _),
                    ClientSession(read, write) as session,
                ):
                    await session.initialize()
                    return await function(session)

            return asyncio.run(run())

        return use

    def test_tools_say_what_they_do_and_take(self, use):
        tools = use(lambda session: session.list_tools()).tools
        assert {tool.name for tool in tools} == self.TOOLS
        for tool in tools:
            assert len(tool.description) > 60 and "Returns:" in tool.description
            Draft202012Validator.check_schema(tool.inputSchema)
            # Clients refuse references, more so into nowhere.
            assert "$ref" not in json.dumps(tool.inputSchema)
            for name, argument in tool.inputSchema["properties"].items():
                assert isinstance(argument["type"], str) and len(argument["description"]) > 20, (tool.name, name)
            needed = {"photo"} if tool.name == "invert" else {"inversion"} if tool.name != "directions" else set()
            assert set(tool.inputSchema.get("required", ())) == needed

    def test_directions(self, use):
        result = use(lambda session: session.call_tool("directions", {}))
        assert not result.isError and "'name': 'smile'" in result.content[0].text

    def test_from_a_photo_to_a_turned_head(self, app, use, inverter):
        """Files go in and out by their addresses on this server."""
        address = f"{app.url}gradio_api/file={upload(app, PHOTO)}"

        async def visit(session):
            async def progress(done, total, message):
                pass

            photos = {"photo": address, "more_photos": [address], "steps": 1}
            inverted = await session.call_tool("invert", photos, progress_callback=progress)
            assert not inverted.isError, inverted.content
            texts = [content.text for content in inverted.content if content.type == "text"]
            (head,) = [text for text in texts if text.endswith("inversion.safetensors")]
            edited = {"inversion": head, "yaw": 20, "edits": {"smile": 1.5}}
            rendered = await session.call_tool("render", edited)
            grid = {"inversion": head, "yaws": [20], "pitches": [0], "size": 16}
            return (
                inverted,
                texts,
                head,
                rendered,
                await session.call_tool("turntable", grid, progress_callback=progress),
            )

        inverted, texts, head, rendered, grid = use(visit)
        assert [content.type for content in inverted.content].count("image") == 2
        assert "'faces_found': [1, 1]" in next(text for text in texts if "'mse'" in text)
        path = Path(app.cache, *Path(head).parts[-2:])
        picture = io.BytesIO(base64.b64decode(rendered.content[0].data))
        assert same(picture, inverter.render(inverter.load_inversion(path), yaw=20, edits={"smile": 1.5}))
        assert not grid.isError and Image.open(io.BytesIO(base64.b64decode(grid.content[0].data))).size == (16, 16)

    @pytest.mark.parametrize(
        "file",
        ["gradio_api/file=/etc/passwd", f"gradio_api/file={PHOTO}", "gradio_api/file=nowhere.png", "static/x.png"],
    )
    def test_other_files_of_the_server_are_not_taken(self, app, use, file):
        result = use(lambda session: session.call_tool("invert", {"photo": app.url + file}))
        assert result.isError and re.search("not fetched|not uploaded", result.content[0].text)


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def noise(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(path)


def picture(size, path):
    Image.new("RGB", size, "grey").save(path)


BAD_PHOTOS = {
    "text.jpg": (lambda path: path.write_text("I am no picture"), "'text.jpg' is not an image"),
    "dot.png": (lambda path: picture((1, 1), path), "no face was found"),
    "bomb.png": (lambda path: path.write_bytes(png_header(20_000, 20_000)), "pixels"),
    "wide.png": (lambda path: path.write_bytes(png_header(10_000, 9_000)), "limit of 64,000,000 pixels"),
    "noise.png": (noise, "no face was found"),
    "half.jpg": (lambda path: path.write_bytes(PHOTO.read_bytes()[:20_000]), "damaged"),
    "empty.jpg": (lambda path: path.touch(), "empty"),
    "vector.svg": (lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "not an image"),
}


class TestBadInputs:
    """Each ends in a message for the caller, without a traceback or a path of the server's."""

    def refused(self, app, call, message):
        with pytest.raises(AppError, match=re.compile(message, re.IGNORECASE)) as caught:
            call()
        assert "Traceback" not in str(caught.value) and str(app.cache) not in str(caught.value)

    @pytest.mark.parametrize("name", BAD_PHOTOS)
    def test_photos(self, app, client, tmp_path, name):
        make, message = BAD_PHOTOS[name]
        make(tmp_path / name)
        self.refused(app, lambda: invert(client, tmp_path / name), message)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": -1}, "steps must be a whole number from 0 to 20"),
            ({"steps": 10**6}, "steps must be"),
            ({"steps": 1.5}, "steps must be"),
            ({"flip": "sideways"}, "flip|not in the list"),
            ({"model": "someone/else"}, "no model|not in the list"),
        ],
    )
    def test_inversion_options(self, app, client, options, message):
        self.refused(app, lambda: invert(client, **options), message)

    @pytest.mark.parametrize(
        ("endpoint", "options", "message"),
        [
            ("/render", {"yaw": 80}, "yaw must lie between -45 and 45"),
            ("/render", {"yaw": "left"}, "number|valid"),
            ("/render", {"edits": {"age": 1}}, "no direction 'age'; available: smile"),
            ("/render", {"edits": {"smile": 1000}}, "smile must lie between"),
            ("/render", {"edits": ["smile"]}, "dictionary"),
            ("/turntable", {"yaws": [50]}, "yaws must lie between -45 and 45"),
            ("/turntable", {"yaws": [None]}, "yaws must be a number"),
            ("/turntable", {"pitches": []}, "pitches must be a list of 1 to 64"),
            ("/turntable", {"yaws": [0] * 65}, "yaws must be a list"),
            ("/turntable", {"yaws": [0] * 64, "pitches": [0] * 9}, "up to 512 views"),
            ("/turntable", {"size": 64}, "size must be a whole number from 16 to 32"),
            ("/orbit", {"frames": 10**6}, "frames must be a whole number from 1 to 240"),
            ("/orbit", {"frames": 0}, "frames must be"),
            ("/mesh", {"resolution": 10**5}, "resolution must be a whole number"),
        ],
    )
    def test_numbers(self, app, client, inversion, endpoint, options, message):
        self.refused(app, lambda: client.predict(handle_file(inversion), api_name=endpoint, **options), message)

    def test_inversion_files(self, app, client, inversion, tmp_path):
        def refused(name, data, message):
            (tmp_path / name).write_bytes(data)
            call = lambda: client.predict(handle_file(tmp_path / name), api_name="/render")  # noqa: E731
            self.refused(app, call, message)

        good = Path(inversion).read_bytes()
        refused("text.safetensors", b"not a safetensors file", "not a safetensors file")
        refused("truncated.safetensors", good[: len(good) // 2], "not a safetensors file")
        refused("length.safetensors", struct.pack("<Q", 2**62) + good[8:], "not a safetensors file")
        tensors = load_file(inversion)
        save_file(tensors, tmp_path / "bare.safetensors")
        refused("bare.safetensors", (tmp_path / "bare.safetensors").read_bytes(), "metadata")
        nan = good.replace(tensors["w"].numpy().tobytes(), (tensors["w"] * float("nan")).numpy().tobytes())
        assert nan != good
        refused("nan.safetensors", nan, "not finite")
        other = re.sub(rb"[0-9a-f]{64}", b"0" * 64, good, count=1)
        refused("other.safetensors", other, "made with the model")

    @pytest.mark.parametrize("path", ["/etc/passwd", str(PHOTO), "../../etc/passwd", "http://127.0.0.1:1/huge.jpg"])
    @pytest.mark.parametrize(
        ("endpoint", "arguments"), [("invert", 5), ("render", 5), ("turntable", 6), ("orbit", 6), ("mesh", 4)]
    )
    def test_paths_reach_no_files(self, app, path, endpoint, arguments):
        """Sent as they are: gradio_client would upload what lies at a path."""
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        url = f"{app.url}gradio_api/call/{endpoint}"
        event = httpx.post(url, json={"data": [file, *[None] * (arguments - 1)]}, timeout=60).json()["event_id"]
        answer = httpx.get(f"{url}/{event}", timeout=60).text
        assert answer.startswith("event: error") and "Traceback" not in answer and "root:" not in answer
        assert re.search("not uploaded|not allowed|not fetched|cannot move", answer, re.IGNORECASE), answer

    @pytest.mark.parametrize("photo", [{"path": str(PHOTO)}, {"path": str(PHOTO), "meta": {}}])
    def test_files_that_are_not_said_to_be_uploads_are_none(self, app, photo):
        """Gradio looks at paths only where they are marked as a file's."""
        url = f"{app.url}gradio_api/call/invert"
        event = httpx.post(url, json={"data": [photo, 0, "automatic", None, None]}, timeout=60).json()["event_id"]
        answer = httpx.get(f"{url}/{event}", timeout=60).text
        assert answer.startswith("event: error") and "not uploaded" in answer

    @pytest.mark.parametrize(
        "photo", ["/etc/passwd", str(PHOTO), "http://127.0.0.1:1/huge.jpg", "data:,", {"path": "/"}]
    )
    def test_further_photos_are_uploads_too(self, app, client, photo):
        uploaded = upload(app, PHOTO)
        url = f"{app.url}gradio_api/call/invert"
        first = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
        event = httpx.post(url, json={"data": [first, 0, "automatic", [photo], None]}, timeout=60).json()["event_id"]
        assert httpx.get(f"{url}/{event}", timeout=60).text.startswith("event: error")

    def test_the_server_lives_and_has_not_grown(self, app, client, inversion):
        for _ in range(3):
            client.predict(handle_file(inversion), yaw=1, api_name="/render")
        files, memory = app.files(), app.resident_mb
        bad = Path(client.output_dir) / "bad.jpg"
        bad.write_text("no picture")
        for _ in range(10):
            with pytest.raises(AppError):
                client.predict(handle_file(bad), api_name="/invert")
        assert app.resident_mb < memory + 30
        # Uploads are kept under names made from their contents: ten times the same one is one file.
        assert len(app.files() - files) == 1
        assert app.process.poll() is None


class TestManyVisitors:
    TURNS = (
        {"yaw": 20, "pitch": 5, "api_name": "/render"},
        {"yaws": [-20, 0, 20], "pitches": [5], "api_name": "/turntable"},
    )

    def test_eight_at_once_get_what_each_gets_alone(self, app, client, inversion, tmp_path_factory):
        photos = sorted((ROOT / "examples").glob("*.jpg"))
        clients = [new_client(app, tmp_path_factory.mktemp("downloads")) for _ in range(8)]
        alone = {photo: Path(invert(clients[0], photo)[-1][0]).read_bytes() for photo in photos}
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            jobs = [pool.submit(invert, client, photos[i % len(photos)]) for i, client in enumerate(clients)]
            # One who turns a head meanwhile; test_app_visitors.py shows that it waits for none of them.
            turning = new_client(app, tmp_path_factory.mktemp("downloads"))
            views = pool.submit(lambda: [turning.predict(handle_file(inversion), **a) for a in self.TURNS])
            for view, arguments in zip(views.result(timeout=120), self.TURNS):
                alone_again = client.predict(handle_file(inversion), **arguments)
                paths = [result[0] if isinstance(result, tuple) else result for result in (view, alone_again)]
                assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()
            for number, job in enumerate(jobs):
                outcome = job.result(timeout=120)
                assert len(outcome) == 3
                assert Path(outcome[-1][0]).read_bytes() == alone[photos[number % len(photos)]]

    def test_a_cancelled_run_makes_room(self, app, client, tmp_path_factory):
        started = time.monotonic()
        job = client.submit(handle_file(PHOTO), steps=20, api_name="/invert")
        while not job.outputs():
            assert time.monotonic() - started < 60 and not job.done()
            time.sleep(0.01)
        job.cancel()
        assert len(invert(new_client(app, tmp_path_factory.mktemp("downloads")), steps=0)) == 2
        # Uncancelled, all 22 results would have come before the other visitor's turn. How many were on their way when
        # the cancellation arrived depends on the machine; that the run ends within a step is tested on the engine.
        seen = len(job.outputs())
        time.sleep(1)
        assert len(job.outputs()) == seen < 22
