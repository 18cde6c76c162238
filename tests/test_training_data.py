"""Data set, augmentation and gradients of the trainers."""

import io
import itertools
import json
import weakref
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from metaaux.cameras import camera_from_pose, mirror_camera, pose_of_camera
from metaaux.data import memory
from metaaux.data.dataset import FaceDataset
from metaaux.data.sampler import FaceSampler, _EndlessSampler
from metaaux.evaluation.photos import open_photos
from metaaux.training.augment import AdaptiveAugmentation
from metaaux.training.cuda_graphs import CapturedFunction
from metaaux.training.distributed import FlatGradients


def write_dataset(path, count=6, size=16, yaws=None):
    """A zip of `count` pictures, each of one grey level with a bright left column, at cameras of `yaws`."""
    yaws = yaws or [0.0] * count
    labels = []
    with zipfile.ZipFile(path, "w") as file:
        for i in range(count):
            array = np.full((size, size, 3), 10 * i, np.uint8)
            array[:, 0] = 255
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            name = f"00/{i:05d}.png"
            file.writestr(name, buffer.getvalue())
            labels.append([name, camera_from_pose(float(yaws[i]), 0.0).tolist()])
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


class TestFaceDataset:
    def test_reads_pictures_and_cameras(self, tmp_path):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip"), 16)
        image, camera = dataset[3]
        assert len(dataset) == 6 and image.shape == (3, 16, 16) and image.dtype == torch.uint8
        assert image[0, 5, 5] == 30 and image[0, 5, 0] == 255
        assert torch.allclose(camera, camera_from_pose(0.0, 0.0))
        assert torch.equal(dataset.load()[3], image)

    def test_folder_equals_zip(self, tmp_path):
        with zipfile.ZipFile(write_dataset(tmp_path / "a.zip")) as file:
            file.extractall(tmp_path / "folder")
        zipped, folder = FaceDataset(tmp_path / "a.zip", 16), FaceDataset(tmp_path / "folder", 16)
        assert torch.equal(zipped.load(), folder.load()) and torch.equal(zipped.cameras, folder.cameras)

    def test_several_are_read_as_one(self, tmp_path):
        first, second = write_dataset(tmp_path / "a.zip"), write_dataset(tmp_path / "b.zip", count=2, yaws=[10, 20])
        dataset = FaceDataset([first, second], 16)
        assert len(dataset) == 8 and dataset.names[6] == dataset.names[0]
        assert torch.equal(dataset.load()[6:], FaceDataset(second, 16).load())
        assert torch.equal(dataset[7][1], camera_from_pose(20.0, 0.0))

    def test_soft_pictures_of_a_source_stay_out(self, tmp_path):
        path = write_dataset(tmp_path / "a.zip")
        sources = {f"00/{i:05d}.png": {"source": "ab"[i % 2], "sharp": -float(i)} for i in range(6)}
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("attributes.json", json.dumps(sources))
        dataset = FaceDataset(path, 16, least_sharp={"a": -2.5})
        assert [int(name[3:8]) for name in dataset.names] == [0, 1, 2, 3, 5]
        assert [a["source"] for a in dataset.attributes] == ["a", "b", "a", "b", "b"]
        sampler = FaceSampler(dataset, 2, "cpu", repeats={"b": 3})
        assert sampler.order.tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4]
        assert FaceDataset(write_dataset(tmp_path / "b.zip"), 16).attributes == [{}] * 6

    def test_resizes(self, tmp_path):
        assert FaceDataset(write_dataset(tmp_path / "a.zip"), 8).load().shape == (6, 3, 8, 8)

    def test_limit(self, tmp_path):
        assert len(FaceDataset(write_dataset(tmp_path / "a.zip"), 16, limit=2)) == 2

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="metaaux prepare"):
            FaceDataset(tmp_path / "none.zip", 16)

    def test_no_labels(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr("x.txt", "")
        with pytest.raises(FileNotFoundError, match="dataset.json"):
            FaceDataset(tmp_path / "a.zip", 16)

    def test_broken_picture(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr("a.png", b"no picture")
            file.writestr("dataset.json", json.dumps({"labels": [["a.png", [0.0] * 25]]}))
        with pytest.raises(ValueError, match="a.png"):
            FaceDataset(tmp_path / "a.zip", 16).load()

    def test_short_label(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr("dataset.json", json.dumps({"labels": [["a.png", [0.0] * 16]]}))
        with pytest.raises(ValueError, match="25 numbers"):
            FaceDataset(tmp_path / "a.zip", 16)

    def test_more_pictures_than_are_decoded_at_once(self, tmp_path):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip", count=260, size=8), 8)
        images = dataset.load()
        assert images.shape == (260, 3, 8, 8) and images.nbytes == dataset.decoded_bytes
        assert torch.equal(images[258], dataset[258][0])

    def test_few_are_held_while_all_are_decoded(self, tmp_path, monkeypatch):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip", count=1_000, size=4), 4)
        decode, alive, most = FaceDataset._decode, weakref.WeakSet(), []

        class Decoded(np.ndarray):  # which, unlike its base class, can be hashed by identity
            __hash__ = object.__hash__

        def counted(self, *file):
            array = decode(self, *file).view(Decoded)
            alive.add(array)
            most.append(len(alive))
            return array

        monkeypatch.setattr(FaceDataset, "_decode", counted)
        assert len(dataset.load()) == len(most) == 1_000
        assert max(most) <= 512

    def test_spawned_workers_read_it(self, tmp_path):
        """As on macOS and Windows; this process has the zip open."""
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip"), 16)
        first = dataset[0][0]
        loader = torch.utils.data.DataLoader(dataset, 6, num_workers=1, multiprocessing_context="spawn")
        images, cameras = next(iter(loader))
        assert torch.equal(images, dataset.load()) and torch.equal(cameras, dataset.cameras)
        assert torch.equal(dataset[0][0], first)


class TestEG3DLayout:
    """FFHQ and CelebA-HQ as EG3D's own preprocessing leaves them."""

    def write(self, path, names, pictures=None):
        """A folder with labels of `names`, of which the cameras' yaws are 10, 11, …, and these `pictures`."""
        labels = [[name, camera_from_pose(10.0 + i, 0.0).tolist()] for i, name in enumerate(names)]
        for i, name in enumerate(names if pictures is None else pictures):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(path / name)
        (path / "dataset.json").write_text(json.dumps({"labels": labels}))
        return path

    @pytest.mark.parametrize("folder", ["", "00000/"])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_mirrored_copies_may_be_left_out(self, tmp_path, folder, zipped):
        originals = [f"{folder}img{i:08d}.png" for i in range(3)]
        path = self.write(tmp_path / "set", [*originals, *(name[:-4] + "_mirror.png" for name in originals)])
        if zipped:
            with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
                for name in path.rglob("*.*"):
                    file.write(name, name.relative_to(path))
            path = tmp_path / "set.zip"
        whole, half = FaceDataset(path, 16), FaceDataset(path, 16, mirrored_copies=False)
        assert len(whole) == 6 and whole.left_out == 0 and half.left_out == 3
        assert half.names == originals and torch.equal(half.cameras, whole.cameras[:3])
        assert torch.equal(half.load(), whole.load()[:3]) and half[2][0][0, 0, 0] == 20

    def test_a_mirrored_copy_without_its_picture_stays(self, tmp_path):
        path = self.write(tmp_path, ["1_mirror.png", "2.png", "_mirror.png"])
        assert FaceDataset(path, 16, mirrored_copies=False).names == ["1_mirror.png", "2.png", "_mirror.png"]

    def test_labels_without_pictures_are_left_out(self, tmp_path):
        path = self.write(tmp_path, ["0.png", "1.png", "2.png"], ["1.png"])
        with pytest.warns(UserWarning, match="2 of 3 labels are of pictures that are not there, such as 0.png"):
            dataset = FaceDataset(path, 16)
        assert dataset.names == ["1.png"] and dataset.left_out == 2
        assert pose_of_camera(dataset.cameras)[0].item() == pytest.approx(11, abs=1e-3)
        (path / "1.png").unlink()
        with pytest.raises(FileNotFoundError, match="none of the 3 pictures .* such as 0.png"):
            FaceDataset(path, 16)

    @pytest.mark.parametrize("text", [None, '{"labels": null}'])
    def test_pictures_of_a_2d_generator_need_no_labels(self, tmp_path, text):
        path = self.write(tmp_path / "set", ["b.png", "a/c.png", "a/c_mirror.png"])
        (path / "dataset.json").unlink()
        (path / "LICENSE.txt").write_text("free")
        if text is not None:
            (path / "dataset.json").write_text(text)
        dataset = FaceDataset(path, 16, labelled=False, mirrored_copies=False)
        assert dataset.names == ["a/c.png", "b.png"] and dataset.load().shape == (2, 3, 16, 16)
        assert torch.equal(dataset.cameras, camera_from_pose(0.0, 0.0).expand(2, -1))
        with pytest.raises((FileNotFoundError, ValueError), match="dataset.json"):
            FaceDataset(path, 16)
        with pytest.raises(FileNotFoundError, match="holds no pictures"):
            (tmp_path / "empty").mkdir()
            FaceDataset(tmp_path / "empty", 16, labelled=False)

    def test_labels_count_where_there_are_any(self, tmp_path):
        path = self.write(tmp_path, ["0.png"])
        assert torch.equal(FaceDataset(path, 16, labelled=False).cameras, FaceDataset(path, 16).cameras)

    def test_evaluation_takes_each_photo_once(self, tmp_path):
        path = self.write(tmp_path, ["0.png", "1.png"])
        before = open_photos(path, 16).digest
        self.write(tmp_path, ["0.png", "0_mirror.png", "1.png", "1_mirror.png"])
        photos = open_photos(path, 16)
        assert photos.names == ["0.png", "1.png"] and photos.digest != before
        assert photos[1].name == "1.png" and pose_of_camera(photos[1].camera)[0].item() == pytest.approx(12, abs=1e-3)


class TestMemory:
    def test_a_containers_limit_counts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(memory, "CGROUP", tmp_path)
        device, host = torch.device("cpu"), memory.psutil.virtual_memory()
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: host)
        assert memory.free_memory(device) == host.available
        (tmp_path / "memory.current").write_text("5000\n")
        (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\n")
        (tmp_path / "memory.max").write_text("max\n")
        assert memory.free_memory(device) == host.available
        (tmp_path / "memory.max").write_text("12000\n")
        assert memory.free_memory(device) == 10_000  # files that were read can be dropped
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert memory.free_memory(device) == 2_500

    def test_the_gpu_is_taken_before_the_host_and_neither_where_both_are_full(self, monkeypatch):
        free = {"cuda": 300, "cpu": 3_000}
        monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
        gpu, host = torch.device("cuda:0"), torch.device("cpu")
        assert [memory.place_for(size, gpu) for size in (100, 101, 1_000, 1_001)] == [gpu, host, host, None]
        assert [memory.place_for(size, host) for size in (1_000, 1_001)] == [host, None]

    def test_workers_share_the_cores(self, monkeypatch):
        monkeypatch.setattr(memory.os, "sched_getaffinity", lambda process: range(24), raising=False)
        counts = []
        for processes in (1, 2, 4, 48):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            counts.append(memory.default_workers())
        assert counts == [8, 8, 6, 1]


class TestFaceSampler:
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_mirrors_picture_and_camera_together(self, tmp_path, in_memory):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip", yaws=[10.0] * 6), 16)
        sampler = FaceSampler(dataset, 64, "cpu", seed=1, in_memory=in_memory, workers=0)
        images, cameras = sampler.next()
        mirrored = images[:, 0, 0, -1] == 1
        assert 10 < mirrored.sum() < 54
        assert torch.equal(pose_of_camera(cameras)[0] < 0, mirrored)
        assert images.min() >= -1 and images.max() == 1
        assert torch.allclose(cameras[mirrored], mirror_camera(dataset.cameras[:1]), atol=1e-6)

    def test_turned_faces_come_more_often(self, tmp_path):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip", count=2, yaws=[0.0, 25.0]), 16)
        yaw = pose_of_camera(FaceSampler(dataset, 1, "cpu", mirror=False).sample_cameras(4000))[0]
        assert 0.75 < (yaw > 20).float().mean() < 0.85  # four to one
        plain = FaceSampler(dataset, 1, "cpu", mirror=False, balance_turned=False).sample_cameras(4000)
        assert 0.45 < (pose_of_camera(plain)[0] > 20).float().mean() < 0.55

    def test_sources_are_repeated(self, tmp_path):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip", count=2), 16)
        with pytest.raises(ValueError, match="'old'; those of the data set are none"):
            FaceSampler(dataset, 1, "cpu", repeats={"old": 3})
        dataset.attributes[1] = {"source": "new"}
        sampler = FaceSampler(dataset, 1, "cpu", in_memory=False, repeats={"new": 3})
        assert sampler.order.tolist() == [0, 1, 1, 1]
        with pytest.raises(ValueError, match="'old'; those of the data set are new"):
            FaceSampler(dataset, 1, "cpu", repeats={"old": 3})

    def test_what_does_not_fit_into_memory_is_streamed(self, tmp_path, monkeypatch):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip"), 16)
        assert FaceSampler(dataset, 2, "cpu", in_memory="auto").images is not None
        free = SimpleNamespace(available=2 * dataset.decoded_bytes)
        monkeypatch.setattr("metaaux.data.memory.psutil.virtual_memory", lambda: free)
        sampler = FaceSampler(dataset, 2, "cpu", in_memory="auto", workers=1)
        assert sampler.images is None and sampler.next()[0].shape == (2, 3, 16, 16)

    def test_what_is_asked_for_and_does_not_fit_is_refused(self, tmp_path, monkeypatch):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip"), 16)
        monkeypatch.setattr("metaaux.data.sampler.free_memory", lambda device: 1e3)
        with pytest.raises(ValueError, match="6 decoded pictures of 16² take .* GB, of which .* free on cpu.*false"):
            FaceSampler(dataset, 2, "cpu", in_memory=True)

    def test_no_more_is_decoded_than_is_shown(self, tmp_path, monkeypatch):
        """Of a set that does not fit into memory: 300 pictures, of which 8 are shown."""
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip", count=300, size=8), 8)
        decoded, decode = [], FaceDataset._decode
        monkeypatch.setattr(FaceDataset, "_decode", lambda self, *file: decoded.append(file) or decode(self, *file))
        monkeypatch.setattr("metaaux.data.sampler.place_for", lambda size, device: None)
        sampler = FaceSampler(dataset, 4, "cpu", workers=0)
        assert decoded == []
        sampler.next()
        sampler.next()
        assert len(decoded) == 8

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_goes_on_where_another_was(self, tmp_path, in_memory):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip"), 16)
        first, second = (FaceSampler(dataset, 8, "cpu", seed=seed, in_memory=in_memory, workers=0) for seed in (1, 2))
        before = [first.next()[0] for _ in range(3)]
        second.next()
        second.set_state(first.state())
        for _ in range(2):
            (image, camera), (other, other_camera) = first.next(), second.next()
            assert torch.equal(image, other) and torch.equal(camera, other_camera)
        assert not torch.equal(before[0], before[1])

    def test_streams_the_same_order_from_any_place(self):
        order = torch.arange(10)
        whole = list(itertools.islice(_EndlessSampler(order, seed=3), 10_000))
        assert list(itertools.islice(_EndlessSampler(order, seed=3, start=4_097), 5_000)) == whole[4_097:9_097]
        assert set(whole) == set(range(10)) and whole[:4096] != whole[4096:8192]

    def test_seed_decides(self, tmp_path):
        dataset = FaceDataset(write_dataset(tmp_path / "a.zip"), 16)
        first, again, other = (FaceSampler(dataset, 32, "cpu", seed=s).next()[0] for s in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)


class TestAugmentation:
    def pair(self):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(16, 3, 32, 32, generator=generator) * 2 - 1, torch.rand(16, 3, 16, 16, generator=generator)

    def test_strength_zero_leaves_the_image(self):
        image, raw = self.pair()
        out, out_raw = AdaptiveAugmentation()(image, raw)
        assert torch.allclose(out, image, atol=1e-5)
        enlarged = torch.nn.functional.interpolate(raw, size=32, mode="bilinear")
        assert torch.allclose(out_raw, enlarged, atol=1e-5)

    def test_transforms_both_alike(self):
        augment = AdaptiveAugmentation()
        augment.p = 0.8
        torch.manual_seed(0)
        image = self.pair()[0]
        out, out_raw = augment(image, image)
        assert torch.allclose(out, out_raw, atol=1e-5)
        changed = (out - image).abs().amax(dim=(1, 2, 3)) > 0.05
        assert changed.float().mean() > 0.8

    def test_follows_the_discriminator(self):
        augment = AdaptiveAugmentation(target=0.6, ramp_images=1000)
        augment.adapt(0.9, 100)
        assert augment.p == pytest.approx(0.1)
        augment.adapt(0.3, 50)
        assert augment.p == pytest.approx(0.05)
        augment.adapt(0.3, 500)
        assert augment.p == 0
        augment.adapt(0.9, 5000)
        assert augment.p == pytest.approx(0.8)


class TestGradients:
    def test_flat_gradients_are_the_parameters(self):
        torch.manual_seed(0)
        layer, unused = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
        gradients = FlatGradients([*layer.parameters(), *unused.parameters()])
        x = torch.randn(5, 3)
        gradients.set(gradients.flatten(layer(x).square().sum()), processes=1)
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        assert all(torch.allclose(p.grad, g) for p, g in zip(layer.parameters(), expected, strict=True))
        assert all(p.grad.abs().sum() == 0 for p in unused.parameters())

    def test_gradients_lie_as_their_parameters_do(self):
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        gradients = FlatGradients(layer.parameters())
        x = torch.randn(2, 3, 5, 5)
        gradients.set(gradients.flatten(layer(x).square().sum()))
        assert layer.weight.grad.stride() == layer.weight.stride()
        expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
        assert torch.allclose(layer.weight.grad, expected)

    def test_not_a_number_becomes_zero(self):
        layer = torch.nn.Linear(1, 1)
        gradients = FlatGradients(layer.parameters())
        gradients.set(torch.tensor([float("nan"), float("inf")]), processes=1)
        assert layer.weight.grad.item() == 0 and layer.bias.grad.item() == 1e5

    def test_captured_function_is_the_function_on_cpu(self):
        captured = CapturedFunction(lambda x: (x * 2, {"sum": x.sum()}))
        for value in (1.0, 3.0):
            doubled, figures = captured(torch.full((2,), value))
            assert doubled.tolist() == [2 * value] * 2 and figures["sum"] == 2 * value

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
    def test_captured_function_replays(self):
        weight = torch.ones(4, device="cuda", requires_grad=True)

        def function(x):
            return torch.autograd.grad((weight * x).square().sum(), weight)[0]

        captured = CapturedFunction(function)
        for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
            assert captured(torch.full((4,), value, device="cuda")).tolist() == [2 * value**2] * 4
        assert captured.graph is not None
