"""Conversion of foreign checkpoints: what comes out, and what hostile files achieve (nothing)."""

from __future__ import annotations

import sys

import pytest
import torch
from eg3d_reference import hashed, hashed_cameras, hashed_weights
from official_pickles import (
    FILTER,
    Persistent,
    Runs,
    assert_refused,
    module_state,
    official_names,  # noqa: F401 (a fixture)
    snapshot,
    stylegan2_contents,
    write,
)
from safetensors.torch import save_file

from metaaux.conversion.arcface import convert_arcface
from metaaux.conversion.eg3d import convert_eg3d
from metaaux.conversion.lpips import convert_lpips
from metaaux.conversion.stylegan2 import convert_stylegan2
from metaaux.hub.loading import load_component
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.identity import IdentityNetwork
from metaaux.models.perceptual import LPIPS
from metaaux.models.stylegan2 import StyleGAN2Generator


class TestEG3D:
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_networks(self, tmp_path, protocol):
        contents, networks = snapshot()
        seen = []
        source = write(tmp_path / "model.pkl", contents, protocol)
        summary = convert_eg3d(source, tmp_path / "out", on_progress=lambda *s: seen.append(s))
        generator = EG3DGenerator.from_pretrained(tmp_path / "out" / "generator")
        discriminator = DualDiscriminator.from_pretrained(tmp_path / "out" / "discriminator")
        for made, network in zip((generator, discriminator), networks):
            expected = network.state_dict()
            assert made.state_dict().keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in made.state_dict().items())
            settings = {name: value for name, value in network.config.items() if name[0] != "_"}
            for name, value in settings.items():
                found = made.config[name]
                assert found == (list(value) if isinstance(value, tuple) else value), name
        with torch.no_grad():
            cameras = hashed_cameras("camera", 1)
            first, second = (g(hashed("z", (1, 512)), cameras).image for g in (generator, networks[0]))
        assert torch.equal(first, second)
        assert summary.networks["generator"]["class"] == "EG3DGenerator"
        assert summary.left_out == ["training_set_kwargs", "G", "augment_pipe"]
        assert str(summary.networks["discriminator"]["tensors"]) in str(summary)
        assert seen == sorted(seen) and seen[-1][1] == source.stat().st_size
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"generator", "discriminator"}

    @pytest.mark.parametrize("default", ["float64", "meta"])
    def test_whatever_the_process_has_as_its_defaults(self, tmp_path, default):
        contents, networks = snapshot()
        source = write(tmp_path / "model.pkl", contents)
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        try:
            convert_eg3d(source, tmp_path)
            generator = load_component(EG3DGenerator, tmp_path / "generator")
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        expected = networks[0].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in generator.state_dict().items())
        assert {tensor.dtype for tensor in generator.state_dict().values()} == {torch.float32}

    def test_existing_folders_are_kept(self, tmp_path):
        contents, _ = snapshot()
        source = write(tmp_path / "model.pkl", contents)
        (tmp_path / "out" / "generator").mkdir(parents=True)
        (tmp_path / "out" / "generator" / "mine.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="--overwrite"):
            convert_eg3d(source, tmp_path / "out")
        assert (tmp_path / "out" / "generator" / "mine.txt").read_text() == "mine"
        convert_eg3d(source, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "generator" / "mine.txt").exists()

    @pytest.mark.parametrize(
        ("rendering", "match"),
        [
            ({"clamp_mode": "relu"}, "clamp_mode = 'relu'"),
            ({"white_back": True}, "white_back = True"),
            ({"ray_start": "auto"}, "ray_start is 'auto'"),
            ({"ray_end": float("nan")}, "ray_end is 'nan'"),
            ({"depth_resolution": float("inf")}, "depth_resolution is 'inf'"),
        ],
    )
    def test_unsupported_settings(self, tmp_path, rendering, match):
        contents, _ = snapshot(**rendering)
        assert_refused(write(tmp_path / "model.pkl", contents), tmp_path, match)

    def test_a_tensor_too_few(self, tmp_path):
        contents, _ = snapshot()
        layer = contents["G_ema"].meta["state"]["_modules"]["decoder"].meta["state"]["_modules"]["net"]
        del layer.meta["state"]["_modules"]["2"].meta["state"]["_parameters"]["bias"]
        assert_refused(write(tmp_path / "model.pkl", contents), tmp_path, "lacks decoder.out.bias")

    def test_values_that_are_not_finite(self, tmp_path):
        contents, _ = snapshot()
        state = contents["G_ema"].meta["state"]["_modules"]["decoder"].meta["state"]["_modules"]["net"].meta["state"]
        state["_modules"]["0"].meta["state"]["_parameters"]["bias"].data[3] = float("nan")
        assert_refused(write(tmp_path / "model.pkl", contents), tmp_path, "decoder.hidden.bias has values")

    @pytest.mark.parametrize(
        ("contents", "match"),
        [
            ({"G": None}, "no generator G_ema"),
            ([1, 2], "no generator G_ema"),
            ({"G_ema": Persistent("Generator", module_state())}, "is a Generator, expected EG3D's"),
        ],
    )
    def test_other_pickles(self, tmp_path, contents, match):
        assert_refused(write(tmp_path / "model.pkl", contents), tmp_path, match)

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (b"", "not a pickle"),
            (b"PK\x03\x04 and so on", "zip archive"),
            (b"\x80\x04}", "damaged|without end"),
            (b"\x80\x04K\x01K\x02.", "damaged"),
            (b"\x80\x04]\x94K\x01s.", "damaged|expected"),
            (b"\x80\x04(((((", "damaged|without end"),
            (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc", "damaged"),
        ],
    )
    def test_no_pickles(self, tmp_path, data, match):
        (tmp_path / "model.pkl").write_bytes(data)
        assert_refused(tmp_path / "model.pkl", tmp_path, match)

    def test_truncated(self, tmp_path):
        source = write(tmp_path / "model.pkl", snapshot()[0])
        source.write_bytes(source.read_bytes()[:-1000])
        assert_refused(source, tmp_path, "model.pkl cannot be converted: a (damaged pickle|pickle without end)")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            convert_eg3d(tmp_path / "none.pkl", tmp_path / "out")


STYLEGAN2 = {"z_dim": 16, "w_dim": 24, "mapping_layers": 3, "image_size": 32, "channel_base": 256, "channel_max": 16}


def stylegan2_generator(**changes):
    generator = StyleGAN2Generator(**STYLEGAN2 | changes).eval()
    generator.load_state_dict(hashed_weights(generator.state_dict()))
    return generator


class TestStyleGAN2:
    def test_pickle(self, tmp_path):
        generator = stylegan2_generator(conv_clamp=256.0)
        judge = DualDiscriminator(image_size=32, camera_dim=0, channel_base=256, channel_max=16, dual=False)
        contents = stylegan2_contents(generator, judge)
        convert_stylegan2(write(tmp_path / "model.pkl", contents), tmp_path / "out")
        made = StyleGAN2Generator.from_pretrained(tmp_path / "out" / "generator")
        assert all(torch.equal(made.state_dict()[n], t) for n, t in generator.state_dict().items())
        assert made.config.conv_clamp == 256.0
        found = DualDiscriminator.from_pretrained(tmp_path / "out" / "discriminator")
        assert not found.config.dual and found.config.camera_dim == 0
        image = hashed("image", (2, 3, 32, 32))
        assert torch.equal(found(image, None, None), judge(image, None, None))

    def rosinality(self, generator):
        """The generator's weights in rosinality's layout."""
        state = {}
        for name, tensor in generator.state_dict().items():
            parts = name.split(".")
            if parts[0] == "mapping_network":
                if parts[1] == "layers":
                    state[f"style.{int(parts[2]) + 1}.{parts[3]}"] = tensor
                continue
            if parts[2] == "const":
                state["input.input"] = tensor[None]
                continue
            level = int(parts[1][1:]).bit_length() - 3
            part = ".".join(parts[3:])
            if parts[2] == "torgb":
                prefix = f"to_rgbs.{level - 1}" if level else "to_rgb1"
                changed = {"weight": tensor[None], "bias": tensor.view(1, 3, 1, 1) if part == "bias" else tensor}
                ours = {"weight": "conv.weight", "bias": "bias"}
            else:
                second = parts[2] == "conv1"
                if part == "noise_const":
                    state[f"noises.noise_{2 * level - (not second)}"] = tensor[None, None]
                    continue
                prefix = f"convs.{2 * (level - 1) + second}" if level else "conv1"
                changed = {"weight": tensor[None], "noise_strength": tensor.reshape(-1)}
                ours = {"weight": "conv.weight", "noise_strength": "noise.weight", "bias": "activate.bias"}
            ours |= {"affine.weight": "conv.modulation.weight", "affine.bias": "conv.modulation.bias"}
            state[f"{prefix}.{ours[part]}"] = changed.get(part, tensor)
        state["convs.0.conv.blur.kernel"] = FILTER * 4
        return state

    def test_rosinality(self, tmp_path):
        generator = stylegan2_generator()
        average = generator.w_avg
        contents = {"g_ema": self.rosinality(generator), "latent_avg": average, "d": {"x": torch.zeros(1)}}
        torch.save(contents, tmp_path / "model.pt")
        summary = convert_stylegan2(tmp_path / "model.pt", tmp_path / "out")
        made = StyleGAN2Generator.from_pretrained(tmp_path / "out" / "generator")
        assert made.state_dict().keys() == generator.state_dict().keys()
        assert all(torch.equal(made.state_dict()[n], t) for n, t in generator.state_dict().items())
        assert summary.left_out == ["d"] and not summary.notes

        torch.save(self.rosinality(generator), tmp_path / "alone.pt")
        summary = convert_stylegan2(tmp_path / "alone.pt", tmp_path / "alone")
        assert "no latent_avg" in summary.notes[0]

    @pytest.mark.parametrize(
        ("contents", "match"),
        [
            ({"state_dict": {"x": torch.zeros(1)}}, "no dictionary of tensors"),
            ({"x": torch.zeros(1)}, "rosinality"),
            ([1], "holds a list"),
        ],
    )
    def test_other_files(self, tmp_path, contents, match):
        torch.save(contents, tmp_path / "model.pt")
        assert_refused(tmp_path / "model.pt", tmp_path, match, convert_stylegan2)


class TestLPIPS:
    @pytest.mark.parametrize("backbone", ["squeeze", "alex"])
    @pytest.mark.parametrize("calibrated", [False, True])
    def test_weights(self, tmp_path, backbone, calibrated):
        network = LPIPS(backbone=backbone, calibrated=True)
        with torch.no_grad():
            for layer in network.calibration:
                layer.weight.abs_()
        tensors = network.state_dict()
        features = {n: t for n, t in tensors.items() if n.startswith("features.")}
        torch.save(features | {"classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "backbone.pth")
        lines = {f"lin{n.split('.')[1]}.model.1.weight": t for n, t in tensors.items() if n not in features}
        torch.save(lines, tmp_path / "linear.pth")
        linear = tmp_path / "linear.pth" if calibrated else None
        summary = convert_lpips(tmp_path / "backbone.pth", tmp_path / "out", linear=linear)
        made = LPIPS.from_pretrained(tmp_path / "out" / "perceptual")
        assert made.config.backbone == backbone and made.config.calibrated is calibrated
        x, y = hashed("x", (1, 3, 64, 64)), hashed("y", (1, 3, 64, 64))
        reference = network
        if not calibrated:
            reference = LPIPS(backbone=backbone)
            reference.load_state_dict(features)
        assert torch.equal(made(x, y), reference(x, y))
        assert summary.left_out == ["classifier"] and bool(summary.notes) is not calibrated

    def test_linear_layers_of_another_backbone(self, tmp_path):
        torch.save(LPIPS("squeeze").state_dict(), tmp_path / "backbone.pth")
        torch.save({f"lin{i}.model.1.weight": torch.ones(1, 8, 1, 1) for i in range(5)}, tmp_path / "linear.pth")
        options = {"convert": convert_lpips, "linear": tmp_path / "linear.pth"}
        assert_refused(tmp_path / "backbone.pth", tmp_path, "lacks calibration.5.weight", **options)

    def test_other_files(self, tmp_path):
        torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "model.pth")
        assert_refused(tmp_path / "model.pth", tmp_path, "holds none of torchvision's", convert_lpips)


class TestArcFace:
    def original(self, network):
        """The network's weights in InsightFace's layout."""
        residual = {
            "norm1": "0",
            "conv1": "1",
            "activation": "2",
            "conv2": "3",
            "norm2": "4",
            "gates.reduce": "5.fc1",
            "gates.expand": "5.fc2",
        }
        outer = {
            "stem": "input_layer.0",
            "stem_norm": "input_layer.1",
            "stem_activation": "input_layer.2",
            "head_norm": "output_layer.0",
            "head": "output_layer.3",
            "embedding_norm": "output_layer.4",
        }
        state = {}
        for name, tensor in network.state_dict().items():
            layer, _, part = name.rpartition(".")
            if layer in outer:
                state[f"{outer[layer]}.{part}"] = tensor
                continue
            _, index, layer = layer.split(".", 2)
            shortcut = {"shortcut": "shortcut_layer.0", "shortcut_norm": "shortcut_layer.1"}.get(layer)
            state[f"body.{index}.{shortcut or 'res_layer.' + residual[layer]}.{part}"] = tensor
        return state

    def test_weights(self, tmp_path):
        with torch.random.fork_rng(devices=[]):
            network = IdentityNetwork().eval()
        state = self.original(network)
        # Names of the published file, which has 24 blocks, the 4th, 8th and 22nd of them with a projection.
        known = {"body.23.res_layer.5.fc2.weight", "body.3.shortcut_layer.1.running_var", "input_layer.2.weight"}
        assert known <= set(state)
        save_file(state, tmp_path / "model.safetensors")
        convert_arcface(tmp_path / "model.safetensors", tmp_path / "out")
        made = IdentityNetwork.from_pretrained(tmp_path / "out" / "identity")
        assert all(torch.equal(made.state_dict()[n], t) for n, t in network.state_dict().items())

    def test_other_files(self, tmp_path):
        torch.save({"body.0.res_layer.9.weight": torch.zeros(1)}, tmp_path / "model.pth")
        assert_refused(tmp_path / "model.pth", tmp_path, "unknown tensor", convert_arcface)


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        """run("eg3d", …) -> (exit code, stdout, stderr) of `metaaux convert`."""
        from metaaux.cli import main

        def invoke(*arguments):
            monkeypatch.setattr(sys, "argv", ["metaaux", "convert", *map(str, arguments)])
            with pytest.raises(SystemExit) as stopped:
                main()
                sys.exit(0)
            captured = capsys.readouterr()
            return stopped.value.code or 0, captured.out, captured.err

        return invoke

    def test_eg3d(self, run, tmp_path):
        source = write(tmp_path / "model.pkl", snapshot()[0])
        code, out, err = run("eg3d", source, tmp_path / "out")
        assert code == 0 and "EG3DGenerator" in out and "DualDiscriminator" in out and "left out" in out
        assert "reading" in err
        code, out, err = run("eg3d", source, tmp_path / "out")
        assert code == 1 and not out and "exists already" in err and "Traceback" not in err

    def test_hostile(self, run, tmp_path):
        source = write(tmp_path / "model.pkl", {"G_ema": Runs(f"touch {tmp_path / 'ran'}")})
        code, out, err = run("eg3d", source, tmp_path / "out")
        assert code == 1 and not out
        lines = [line for line in err.splitlines() if "Error" in line]
        assert len(lines) == 1 and "system" in lines[0] and "Traceback" not in err
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()

    def test_lpips(self, run, tmp_path):
        torch.save(LPIPS("squeeze").state_dict(), tmp_path / "model.pth")
        code, out, _ = run("lpips", tmp_path / "model.pth", tmp_path / "out")
        assert code == 0 and "perceptual: LPIPS" in out and "uncalibrated" in out

    def test_unknown_kind(self, run, tmp_path):
        code, _, err = run("stylegan9", tmp_path, tmp_path)
        assert code == 2 and "stylegan9" in err
