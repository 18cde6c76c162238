"""`MetaAuxInverter`: loading and saving, inverting, rendering; nothing shared changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metaaux import Head, Inversion, InversionFileError, MetaAuxInverter
from metaaux.faces import NoFaceError, UnreadableImageError, camera_from_pose, pose_of_camera
from metaaux.inversion import STEP_KEYS

ROOT = Path(__file__).resolve().parent.parent


def hash_of(inverter):
    """Digest of every parameter and buffer of every component, and of the configuration."""
    digest = hashlib.sha256(inverter.to_json_string().encode())
    for name, component in sorted(inverter.components.items()):
        if component is not None:
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def assert_same(first, second):
    """Two inversions are equal but for the times."""
    assert torch.equal(first.w, second.w)
    assert torch.equal(first.offset_planes, second.offset_planes)
    assert first.weight_offsets.keys() == second.weight_offsets.keys()
    for layer, offset in first.weight_offsets.items():
        assert torch.equal(offset, second.weight_offsets[layer]), layer
    for one, other in zip(first.steps, second.steps, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


class TestInvert:
    def test_steps(self, tiny_inverter, crops, cameras):
        calls = []
        inversion = tiny_inverter.invert(crops[1], 3, lambda *call: calls.append(call), camera=cameras[1])
        assert [step["step"] for step in inversion.steps] == [-1, 0, 1, 2, 3]
        assert all(tuple(step) == STEP_KEYS and step["seconds"] > 0 for step in inversion.steps)
        assert [step for step, _, _ in calls] == [-1, 0, 1, 2, 3]
        assert [losses for _, _, losses in calls] == inversion.steps
        assert all(isinstance(image, Image.Image) and image.size == (32, 32) for _, image, _ in calls)
        assert inversion.steps[3]["total"] < inversion.steps[1]["total"]
        # What was reported last is what the inversion renders.
        assert calls[-1][1].tobytes() == tiny_inverter.render(inversion).tobytes()
        assert calls[0][1].tobytes() != calls[1][1].tobytes()

    def test_total_is_the_weighted_sum(self, tiny_inversion):
        for step in tiny_inversion.steps:
            expected = step["mse"] + 0.8 * step["perceptual"] + 0.1 * step["identity"] + 0.005 * step["adversarial"]
            assert step["total"] == pytest.approx(expected, rel=1e-5)

    def test_mse_is_of_images_in_minus_one_to_one(self, tiny_inverter, crops, cameras):
        with torch.no_grad():
            w = tiny_inverter.encoder(torch.from_numpy(np.array(crops[0])).permute(2, 0, 1)[None] / 127.5 - 1)
            image = tiny_inverter.generator.synthesize(w, cameras[:1]).image
        expected = (image - (torch.from_numpy(np.array(crops[0])).permute(2, 0, 1) / 127.5 - 1)).square().mean()
        inversion = tiny_inverter.invert(crops[0], steps=0, camera=cameras[0])
        assert inversion.steps[0]["mse"] == pytest.approx(expected.item(), rel=1e-4)

    def test_default_number_of_steps(self, tiny_components, crops, cameras):
        inverter = MetaAuxInverter(**tiny_components, inner_steps=1)
        inverter.set_progress_bar_config(disable=True)
        assert inverter.invert(crops[0], camera=cameras[0]).steps[-1]["step"] == 1

    def test_result_is_complete(self, tiny_inverter, tiny_inversion, crops, cameras):
        assert tiny_inversion.weight_offsets.keys() == tiny_inverter.generator.modulated_layers.keys()
        assert torch.equal(tiny_inversion.camera, cameras[1])
        assert tiny_inversion.aligned.permute(1, 2, 0).numpy().tobytes() == crops[1].tobytes()
        assert tiny_inversion.fingerprint == tiny_inverter.fingerprint

    def test_nothing_shared_changes(self, tiny_inverter, crops, cameras):
        before = hash_of(tiny_inverter)
        inversion = tiny_inverter.invert(crops[0], steps=2, camera=cameras[0])
        tiny_inverter.orbit(inversion, frames=2)
        assert hash_of(tiny_inverter) == before
        assert all(p.grad is None for c in tiny_inverter.components.values() if c for p in c.parameters())

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_inside_the_callers_context(self, tiny_inverter, tiny_inversion, crops, cameras, context):
        with context():
            inside = tiny_inverter.invert(crops[1], steps=2, camera=cameras[1])
            tiny_inverter.render(inside, yaw=5)
        assert_same(inside, tiny_inversion)

    def test_loaded_inside_inference_mode(self, tiny_folder, tiny_inversion, crops, cameras):
        with torch.inference_mode():
            inverter = MetaAuxInverter.from_pretrained(tiny_folder)
        inverter.set_progress_bar_config(disable=True)
        assert_same(inverter.invert(crops[1], steps=2, camera=cameras[1]), tiny_inversion)

    def test_threads_get_what_each_would_get_alone(self, tiny_inverter, crops, cameras):
        alone = [tiny_inverter.invert(crop, steps=2, camera=camera) for crop, camera in zip(crops, cameras)]
        views = [tiny_inverter.render(inversion, yaw=9).tobytes() for inversion in alone]
        together, barrier = {}, threading.Barrier(len(crops))

        def work(index):
            barrier.wait()
            inversion = tiny_inverter.invert(crops[index], steps=2, camera=cameras[index])
            together[index] = inversion, tiny_inverter.render(inversion, yaw=9).tobytes()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(crops))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, inversion in enumerate(alone):
            assert_same(together[index][0], inversion)
            assert together[index][1] == views[index]

    def test_several_photos_of_one_person(self, tiny_inverter, tiny_inversion, crops, cameras):
        both = tiny_inverter.invert([crops[1], crops[2]], steps=1, camera=cameras[1:])
        assert both.w.shape == tiny_inversion.w.shape and not torch.equal(both.w, tiny_inversion.w)
        assert torch.equal(both.camera, cameras[1]) and torch.equal(both.aligned, tiny_inversion.aligned)
        twice = tiny_inverter.invert([crops[1]] * 2, steps=2, camera=cameras[[1, 1]])
        torch.testing.assert_close(twice.w, tiny_inversion.w)

    def test_frontal_photos_weigh_more_in_the_code(self, tiny_inverter, crops):
        views = torch.stack([camera_from_pose(yaw, 0) for yaw in (20, 0, -20)])
        codes = [
            tiny_inverter.invert(crop, steps=0, camera=camera).w for crop, camera in zip(crops, views, strict=True)
        ]
        share = np.exp(-2) / (1 + 2 * np.exp(-2))
        mixed = tiny_inverter.invert(crops, steps=0, camera=views).w
        torch.testing.assert_close(mixed, share * codes[0] + (1 - 2 * share) * codes[1] + share * codes[2])
        sides = tiny_inverter.invert(crops[::2], steps=0, camera=views[::2]).w
        torch.testing.assert_close(sides, (codes[0] + codes[2]) / 2)

    def test_the_loss_is_the_mean_over_the_photos(self, tiny_inverter, crops, cameras):
        both = tiny_inverter.invert(crops[1:], steps=0, camera=cameras[1:])
        with torch.no_grad():
            image = tiny_inverter.generator.synthesize(both.w.expand(2, -1), cameras[1:]).image
        photos = torch.stack([torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 127.5 - 1 for crop in crops[1:]])
        assert both.steps[0]["mse"] == pytest.approx((image - photos).square().mean().item(), rel=1e-4)

    def test_an_exception_of_the_callback_ends_the_inversion(self, tiny_inverter, crops, cameras):
        def stop(step, image, losses):
            if step == 0:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            tiny_inverter.invert(crops[0], steps=5, on_step=stop, camera=cameras[0])

    @pytest.mark.parametrize(
        ("photo", "options", "match"),
        [
            ([], {}, "at least one photo"),
            (Image.new("RGB", (32, 32)), {"steps": -1}, "steps must be 0 or more"),
            (Image.new("RGB", (32, 32)), {"camera": torch.zeros(2, 25)}, "1 photos and 2 cameras"),
            (Image.new("RGB", (32, 24)), {"camera": camera_from_pose(0, 0)}, "crop of 32x32 pixels, got 32x24"),
        ],
    )
    def test_wrong_arguments(self, tiny_inverter, photo, options, match):
        with pytest.raises(ValueError, match=match):
            tiny_inverter.invert(photo, **options)

    def test_photos_that_cannot_be_used(self, tiny_inverter, tmp_path):
        with pytest.raises(NoFaceError, match="no face"):
            tiny_inverter.invert(Image.new("RGB", (200, 200), "gray"))
        path = tmp_path / "photo.jpg"
        with pytest.raises(UnreadableImageError, match="does not exist"):
            tiny_inverter.invert(path)
        path.write_text("no picture")
        with pytest.raises(UnreadableImageError, match=r"photo\.jpg"):
            tiny_inverter.invert(str(path))

    def test_components_in_training_mode(self, tiny_folder, crops, cameras):
        inverter = MetaAuxInverter.from_pretrained(tiny_folder)
        inverter.identity.train()
        with pytest.raises(RuntimeError, match=r"\['identity'\] are in training mode"):
            inverter.invert(crops[0], camera=cameras[0])


class TestRender:
    def test_default_view_is_the_photos(self, tiny_inverter, tiny_inversion):
        yaw, pitch = (float(angle) for angle in pose_of_camera(tiny_inversion.camera))
        default = np.array(tiny_inverter.render(tiny_inversion)).astype(int)
        stated = np.array(tiny_inverter.render(tiny_inversion, yaw=yaw, pitch=pitch)).astype(int)
        assert np.abs(default - stated).max() <= 1
        only_yaw = np.array(tiny_inverter.render(tiny_inversion, yaw=yaw)).astype(int)
        assert np.abs(only_yaw - stated).max() <= 1

    def test_camera_keeps_its_distance_and_focal_length(self, tiny_inverter, tiny_inversion):
        camera = camera_from_pose(12, -4, radius=3.0, focal=3.5)
        head = dataclasses.replace(tiny_inverter.prepare(tiny_inversion), camera=camera)
        default = np.array(tiny_inverter.render(head)).astype(int)
        assert np.abs(np.array(tiny_inverter.render(head, yaw=12, pitch=-4)).astype(int) - default).max() <= 1

    @pytest.mark.parametrize("pose", [{"yaw": 25}, {"pitch": 15}])
    def test_views_differ(self, tiny_inverter, tiny_inversion, pose):
        assert tiny_inverter.render(tiny_inversion, **pose) != tiny_inverter.render(tiny_inversion)

    def test_a_prepared_head_gives_the_same_views(self, tiny_inverter, tiny_inversion):
        head = tiny_inverter.prepare(tiny_inversion)
        assert isinstance(head, Head) and not head.planes.requires_grad
        assert tiny_inverter.render(head, yaw=7) == tiny_inverter.render(tiny_inversion, yaw=7)

    def test_offsets_matter(self, tiny_inverter, tiny_inversion):
        view = tiny_inverter.render(tiny_inversion)
        assert tiny_inverter.render(dataclasses.replace(tiny_inversion, weight_offsets={})) != view
        assert tiny_inverter.render(dataclasses.replace(tiny_inversion, offset_planes=None)) != view

    def test_after_saving_and_loading(self, tiny_inverter, tiny_inversion, tmp_path):
        tiny_inversion.save(tmp_path / "face.safetensors")
        loaded = tiny_inverter.load_inversion(tmp_path / "face.safetensors")
        assert tiny_inverter.render(loaded, yaw=-15) == tiny_inverter.render(tiny_inversion, yaw=-15)
        assert_same(Inversion.load(tmp_path / "face.safetensors"), tiny_inversion)

    def test_orbit(self, tiny_inverter, tiny_inversion):
        frames = tiny_inverter.orbit(tiny_inversion, frames=4, yaw_range=20, pitch_range=8)
        assert len(frames) == 4
        assert frames[1] == tiny_inverter.render(tiny_inversion, yaw=20, pitch=0) != frames[3]
        with pytest.raises(ValueError, match="frames must be at least 1"):
            tiny_inverter.orbit(tiny_inversion, frames=0)

    def test_paths_of_an_orbit(self, tiny_inverter, tiny_inversion):
        shares = []
        swing = tiny_inverter.orbit(tiny_inversion, frames=4, yaw_range=20, path="swing", progress=shares.append)
        assert shares == [0.25, 0.5, 0.75, 1.0]
        assert swing == [tiny_inverter.render(tiny_inversion, yaw=yaw, pitch=0) for yaw in (0, 20, 0, -20)]
        poses = [(3, -4), (8, 2)]
        assert tiny_inverter.orbit(tiny_inversion, path=poses) == [
            tiny_inverter.render(tiny_inversion, yaw=yaw, pitch=pitch) for yaw, pitch in poses
        ]
        with pytest.raises(ValueError, match="ellipse, swing, nod or a list of poses, got 'spiral'"):
            tiny_inverter.orbit(tiny_inversion, path="spiral")

    def test_an_orbit_computes_planes_once(self, tiny_inverter, tiny_inversion):
        calls = []
        handle = tiny_inverter.generator.backbone.register_forward_hook(lambda *args: calls.append(1))
        try:
            tiny_inverter.orbit(tiny_inversion, frames=3)
        finally:
            handle.remove()
        assert len(calls) == 1

    def test_angles_out_of_range(self, tiny_inverter, tiny_inversion):
        for yaw in (90, -120, float("nan")):
            with pytest.raises(ValueError, match="yaw must lie strictly between -90 and 90"):
                tiny_inverter.render(tiny_inversion, yaw=yaw)

    def test_edits_name_what_is_available(self, tiny_inverter, tiny_inversion):
        with pytest.raises(ValueError, match="unknown edit 'age'; this model's directions: none"):
            tiny_inverter.render(tiny_inversion, edits={"age": 1.5})
        with pytest.raises(ValueError, match="prepare"):
            tiny_inverter.render(tiny_inverter.prepare(tiny_inversion), edits={"age": 1.5})
        assert tiny_inverter.render(tiny_inversion, edits={}) == tiny_inverter.render(tiny_inversion)

    def test_progress_bar_can_be_disabled(self, tiny_folder, tiny_inversion, capfd):
        inverter = MetaAuxInverter.from_pretrained(tiny_folder)
        capfd.readouterr()
        inverter.orbit(tiny_inversion, frames=2)
        assert "2/2" in capfd.readouterr().err
        inverter.set_progress_bar_config(disable=True)
        inverter.orbit(tiny_inversion, frames=2)
        assert capfd.readouterr().err == ""


class TestForeignInversions:
    def test_another_generators_inversion(self, tiny_folder, tiny_inversion, tmp_path):
        other = MetaAuxInverter.from_pretrained(tiny_folder)
        with torch.no_grad():
            other.generator.decoder.out.weight.add_(1)
        with pytest.raises(ValueError, match="made with the model"):
            other.render(tiny_inversion)
        tiny_inversion.save(tmp_path / "face.safetensors")
        with pytest.raises(InversionFileError, match="made with the model"):
            other.load_inversion(tmp_path / "face.safetensors")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"w": torch.zeros(5)}, r"w has shape \[5\], this generator takes \[16\] or \[6, 16\]"),
            ({"weight_offsets": {"backbone.b4.nothing": torch.zeros(4, 4, 1, 1)}}, "does not have"),
            ({"weight_offsets": {"backbone.b4.conv1": torch.zeros(4, 4, 1, 1)}}, r"\[16, 16, 1, 1\]"),
        ],
    )
    def test_shapes(self, tiny_inverter, tiny_inversion, change, match):
        with pytest.raises(ValueError, match=match):
            tiny_inverter.prepare(dataclasses.replace(tiny_inversion, **change))

    def test_fingerprint_follows_the_generator(self, tiny_folder):
        inverter = MetaAuxInverter.from_pretrained(tiny_folder)
        first = inverter.fingerprint
        generator = type(inverter.generator).from_config(inverter.generator.config)
        inverter.generator = generator
        assert inverter.fingerprint != first


class TestFullSizeConfiguration:
    """hub_configs/metaaux-ffhq: EG3D's ffhq512-128 shape, without weights."""

    FOLDER = ROOT / "hub_configs" / "metaaux-ffhq"

    @pytest.fixture
    def components(self):
        import importlib

        index = json.loads((self.FOLDER / "model_index.json").read_text())
        networks = {}
        for name, value in index.items():
            if isinstance(value, list):
                cls = getattr(importlib.import_module(value[0]), value[1])
                with torch.device("meta"):
                    networks[name] = cls.from_config(cls.load_config(self.FOLDER / name))
        return networks

    def test_generator_has_the_released_shape(self, components):
        config = components["generator"].config
        assert (config.image_size, config.neural_resolution, config.plane_resolution) == (512, 128, 256)
        assert (config.depth_samples, config.importance_samples, config.w_dim) == (48, 48, 512)
        assert components["generator"].num_ws == 14

    def test_components_fit_together(self, components):
        generator, auxiliary = components["generator"], components["auxiliary"]
        assert {k: tuple(v) for k, v in auxiliary.config.layer_shapes.items()} == generator.modulated_layers
        assert all(components[name].config.image_size == 512 for name in ("encoder", "auxiliary", "discriminator"))
        assert components["encoder"].config.num_ws == generator.num_ws
        assert components["discriminator"].config.raw_size == generator.config.neural_resolution
        assert auxiliary.config.plane_resolution == generator.config.plane_resolution
        assert components["perceptual"].config.calibrated

    def test_holds_no_weights(self):
        assert {path.name for path in self.FOLDER.rglob("*") if path.is_file()} == {
            "README.md",
            "model_index.json",
            "config.json",
        }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_agrees_with_the_cpu(self, tiny_folder, tiny_inversion, crops, cameras, dtype):
        inverter = MetaAuxInverter.from_pretrained(tiny_folder, dtype=dtype).to("cuda")
        inversion = inverter.invert(crops[1], steps=2, camera=cameras[1])
        tolerance = 1e-2 if dtype == torch.float32 else 0.2
        assert inversion.steps[-1]["total"] == pytest.approx(tiny_inversion.steps[-1]["total"], rel=tolerance)
        assert inverter.render(inversion, yaw=10).size == (32, 32)
