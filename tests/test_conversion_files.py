"""Conversions to single files (SqueezeNet's features, age and gender), and of dlib's recogniser."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from metaaux.cli import app
from metaaux.conversion.age_gender import convert_age_gender
from metaaux.conversion.pickles import ConversionError
from metaaux.conversion.recogniser import convert_recogniser
from metaaux.conversion.squeezenet import CAFFE_MEAN, convert_squeezenet
from metaaux.models.age_gender import AgeGenderNetwork
from metaaux.models.perceptual import LPIPS, squeezenet_features
from metaaux.models.recogniser import FaceRecogniser
from metaaux.training.loading import load_identity, load_perceptual

IMAGES = torch.rand(2, 3, 33, 33, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def backbone():
    """torchvision's weights of SqueezeNet 1.1, random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {f"features.{name}": tensor for name, tensor in squeezenet_features().state_dict().items()}


class TestSqueezeNet:
    def test_torchvision(self, backbone, tmp_path):
        torch.save(backbone | {"classifier.1.weight": torch.zeros(1000, 512, 1, 1)}, tmp_path / "squeezenet1_1.pth")
        output = CliRunner().invoke(
            app, ["convert", "squeezenet", str(tmp_path / "squeezenet1_1.pth"), str(tmp_path / "features.safetensors")]
        )
        assert output.exit_code == 0 and "ImageNet's mean" in output.output and "left out: classifier" in output.output
        plain = LPIPS("squeeze", normalization="imagenet")
        plain.load_state_dict(backbone)
        for found, expected in zip(
            load_perceptual(tmp_path / "features.safetensors").taps(IMAGES), plain.taps(IMAGES)
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("separator", ["/", ".", "_"])
    def test_caffe(self, backbone, tmp_path, separator):
        fires = {"3": 2, "4": 3, "6": 4, "7": 5, "9": 6, "10": 7, "11": 8, "12": 9}
        state = {"conv10.weight": torch.zeros(1000, 512, 1, 1)}
        for name, tensor in backbone.items():
            _, index, *layer, part = name.split(".")
            if layer:
                layer = "squeeze1x1" if layer == ["squeeze"] else layer[0]
                state[f"fire{fires[index]}{separator}{layer}.{part}"] = tensor
            else:
                state[f"conv1.{part}"] = tensor
        save_file(state, tmp_path / "caffe.safetensors")
        convert_squeezenet(tmp_path / "caffe.safetensors", tmp_path / "features.safetensors")
        plain = LPIPS("squeeze", normalization="folded")
        plain.load_state_dict(backbone)
        bgr = ((IMAGES + 1) * 127.5).flip(1) - torch.tensor(CAFFE_MEAN)[:, None, None]
        for found, expected in zip(load_perceptual(tmp_path / "features.safetensors").taps(IMAGES), plain.taps(bgr)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)

    def test_other_files(self, backbone, tmp_path):
        path, target = tmp_path / "weights.pth", tmp_path / "features.safetensors"
        for state, match in (
            ({"conv1.weight": torch.zeros(1), "fire1.weight": torch.zeros(1)}, "unknown tensor 'fire1.weight'"),
            (backbone | {"features.0.bias": torch.full((64,), torch.nan)}, "not finite"),
            ({name: tensor for name, tensor in backbone.items() if ".12." not in name}, "lacks features.12"),
        ):
            torch.save(state, path)
            with pytest.raises(ConversionError, match=match):
                convert_squeezenet(path, target)
            assert not target.exists()
        torch.save(backbone, path)
        convert_squeezenet(path, target)
        with pytest.raises(FileExistsError, match="--overwrite"):
            convert_squeezenet(path, target)
        convert_squeezenet(path, target, overwrite=True)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            convert_squeezenet(path, tmp_path / "nowhere" / "features.safetensors")


class TestAgeGender:
    def published(self, network, folder, quantise, shards=2):
        """Writes a network as face-api.js publishes it; returns the manifest's path."""
        order = {"filters": (2, 3, 1, 0), "depthwise_filter": (2, 3, 0, 1), "pointwise_filter": (2, 3, 1, 0)}
        order |= {"weights": (1, 0), "bias": (0,)}
        entries, data = [], b""
        for name, tensor in network.state_dict().items():
            array = tensor.numpy().transpose(order[name.rpartition(".")[2]])
            entry = {"name": name.replace(".", "/"), "shape": list(array.shape), "dtype": "float32"}
            if quantise:
                low, scale = float(array.min()), float(array.max() - array.min()) / 255 or 1.0
                entry["quantization"] = {"dtype": "uint8", "scale": scale, "min": low}
                array = ((array - low) / scale).round().astype(np.uint8)
            entries.append(entry)
            data += array.astype(array.dtype.newbyteorder("<")).tobytes()
        names = [f"age_gender_model-shard{number}" for number in range(1, shards + 1)]
        cut = len(data) // shards
        for number, name in enumerate(names):
            end = None if number == shards - 1 else (number + 1) * cut
            (folder / name).write_bytes(data[number * cut : end])
        path = folder / "age_gender_model-weights_manifest.json"
        path.write_text(json.dumps([{"weights": entries, "paths": names}]))
        return path

    @pytest.fixture
    def network(self, attribute_file):
        return AgeGenderNetwork.from_file(attribute_file)

    def test_whole_numbers_of_eight_bits(self, network, tmp_path):
        source, target = self.published(network, tmp_path, True), tmp_path / "age_gender.safetensors"
        output = CliRunner().invoke(app, ["convert", "age-gender", str(source), str(target)])
        assert output.exit_code == 0 and "age_gender.safetensors" in output.output
        found = AgeGenderNetwork.from_file(target).state_dict()
        for name, tensor in network.state_dict().items():
            step = (tensor.max() - tensor.min()) / 255
            assert (found[name] - tensor).abs().max() <= 0.51 * step + 1e-6, name

    def test_numbers_as_they_are(self, network, tmp_path):
        target = tmp_path / "age_gender.safetensors"
        convert_age_gender(self.published(network, tmp_path, False, shards=1), target)
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in load_file(target).items())
        ages, _ = AgeGenderNetwork.from_file(target)(IMAGES)
        assert torch.equal(ages, network(IMAGES)[0])

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda groups: groups[0]["paths"].append("../age"), "do not lie beside it"),
            (lambda groups: groups[0]["paths"].append("absent"), "absent, which it names, does not lie"),
            (lambda groups: groups[0]["paths"].pop(), "shorter than it says"),
            (lambda groups: groups[0]["weights"].pop(), "longer than it says"),
            (lambda groups: groups[0]["weights"][0].update(name="age/other"), "unknown weight 'age/other'"),
            (lambda groups: groups[0].pop("paths"), "no weights manifest"),
            (lambda groups: groups[0]["weights"][0].update(dtype="string"), "no weights manifest"),
        ],
    )
    def test_other_manifests(self, network, tmp_path, change, match):
        source = self.published(network, tmp_path, False)
        groups = json.loads(source.read_text())
        change(groups)
        source.write_text(json.dumps(groups))
        with pytest.raises(ConversionError, match=match):
            convert_age_gender(source, tmp_path / "age_gender.safetensors")
        assert not (tmp_path / "age_gender.safetensors").exists()


class TestRecogniser:
    def packed(self, *numbers):
        """Whole numbers as dlib writes them."""
        sizes = [(number.bit_length() + 7) // 8 or 1 for number in numbers]
        return b"".join(bytes([size]) + number.to_bytes(size, "little") for number, size in zip(numbers, sizes))

    def dlib_file(self, network):
        """A network in the layout of dlib's file, whose layers' settings are left out or made up."""
        data = b"\x01\x01\x01\x0dloss_metric_2" + bytes(20)
        for module in network.modules():
            kind = type(module).__name__
            own = [parameter.detach() for parameter in module.parameters()]
            if kind == "Conv2d":
                data += b"\x01\x05con_4"
            elif kind == "ChannelAffine":
                data += b"\x01\x07affine_"
            elif kind == "Linear":
                data += b"\x01\x04fc_2" + self.packed(module.out_features, module.in_features)
                own = [own[0].T]
            else:
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            data += self.packed(2, len(flat), 1, 1, 1) + flat.numpy().astype("<f4").tobytes()
            data += b"\x01\x01\x05relu_110" + bytes(30)
        return data

    def test_dlibs_own_file(self, tmp_path):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network = FaceRecogniser()
        data = self.dlib_file(network)
        (tmp_path / "model.dat").write_bytes(data)
        convert_recogniser(tmp_path / "model.dat", tmp_path)
        found = load_identity(tmp_path / "identity").state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in network.state_dict().items())
        fc = data.index(b"\x01\x04fc_2")
        for changed, match in (
            (data[:fc], "ends before the layer that fc is here"),
            (data[: fc + 100], "fc is here has the shape"),
            (data[: fc + 7], "a size in it is none"),
            (data + data[fc:], "more layers"),
            (b"", "ends before the layer that stem.conv is here"),
        ):
            (tmp_path / "model.dat").write_bytes(changed)
            with pytest.raises(ConversionError, match=match):
                convert_recogniser(tmp_path / "model.dat", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_becomes_an_identity_network(self, tmp_path):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = FaceRecogniser()
        save_file({name: tensor.half() for name, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
        output = CliRunner().invoke(app, ["convert", "recogniser", str(tmp_path / "w.safetensors"), str(tmp_path)])
        assert output.exit_code == 0 and "identity: FaceRecogniser" in output.output
        found = load_identity(tmp_path / "identity")
        assert isinstance(found, FaceRecogniser) and found.dtype == torch.float32
        for name, tensor in network.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor.half().float())

    def test_other_files(self, tmp_path):
        save_file({"fc.weight": torch.zeros(128, 256)}, tmp_path / "w.safetensors")
        with pytest.raises(ConversionError, match="not a supported FaceRecogniser: it lacks"):
            convert_recogniser(tmp_path / "w.safetensors", tmp_path / "out")
        assert not (tmp_path / "out").exists()
