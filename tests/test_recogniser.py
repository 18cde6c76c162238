"""FaceRecogniser: where chips are cut, gradients, errors, files."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from metaaux.cameras import camera_from_pose, project_points
from metaaux.models.recogniser import (
    CHIP_POINTS,
    CHIP_SIZE,
    WORLD_POINTS,
    FaceRecogniser,
    chip_transforms,
    chips_from_crops,
)

TINY = dict(widths=(4, 6, 8), depths=(1, 2, 1), embedding_dim=5)


@pytest.fixture
def recogniser():
    torch.manual_seed(0)
    return FaceRecogniser(**TINY).eval()


def cameras(*yaws):
    return torch.stack([camera_from_pose(float(yaw), 5.0) for yaw in yaws])


def images(count, side):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def positions_image(side):
    """A picture whose first two channels hold each pixel's position in units of the side."""
    centres = (torch.arange(side) + 0.5) / side
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack((u, v, torch.zeros_like(u)))[None]


class TestChips:
    @pytest.mark.parametrize("yaw", [-40, 0, 25])
    def test_eyes_and_nose_lie_where_dlib_has_them(self, yaw):
        camera = cameras(yaw)
        chip = chips_from_crops(positions_image(256), camera)
        template = torch.tensor(CHIP_POINTS)
        found = F.grid_sample(chip, template[None, None] * 2 - 1, align_corners=False)[0, :2, 0].T
        expected = project_points(torch.tensor(WORLD_POINTS), camera[0])[0]
        # A similarity transform cannot follow a turned face exactly.
        assert (found - expected).norm(dim=1).max() < (0.03 if yaw == 0 else 0.1)
        assert torch.allclose(found.mean(0), expected.mean(0), atol=1e-3)

    def test_size_of_the_crop_does_not_matter(self):
        smooth = F.interpolate(images(2, 8), size=(512, 512), mode="bicubic")
        chips = [
            chips_from_crops(F.interpolate(smooth, size=(s, s), mode="bilinear", antialias=True), cameras(0, 20))
            for s in (128, 256, 512)
        ]
        assert all((chip - chips[0]).abs().mean() < 0.01 for chip in chips)

    def test_equals_grid_sample(self):
        crops, camera = images(2, 64), cameras(-30, 10)
        transform = chip_transforms(camera)
        theta = torch.cat(
            (transform[..., :2], (2 * (transform[..., :2].sum(-1) / 2 + transform[..., 2]) - 1)[..., None]), dim=-1
        )
        grid = F.affine_grid(theta, [2, 3, CHIP_SIZE, CHIP_SIZE], align_corners=False)
        expected = F.grid_sample(crops, grid, padding_mode="border", align_corners=False)
        assert torch.allclose(chips_from_crops(crops, camera), expected, atol=1e-4)

    def test_border_is_continued(self):
        camera = cameras(0)
        camera[:, [18, 21]] = 3.0  # a principal point far outside
        crops = torch.zeros(1, 3, 16, 16)
        crops[..., -1, -1] = 0.7
        assert torch.allclose(chips_from_crops(crops, camera), torch.full((1, 3, CHIP_SIZE, CHIP_SIZE), 0.7))


class TestFaceRecogniser:
    def test_shape_and_batch_independence(self, recogniser):
        x, c = images(3, 64), cameras(-10, 0, 10)
        embeddings = recogniser(x, c)
        assert embeddings.shape == (3, 5) and embeddings.dtype == torch.float32
        assert torch.allclose(recogniser(x[1:2], c[1:2])[0], embeddings[1], atol=1e-5)

    def test_dlibs_network(self):
        with torch.device("meta"):
            network = FaceRecogniser()
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convolutions) == 29 and len(network.blocks) == 14
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(5.6e6, rel=0.02)

    def test_image_gradient_is_that_of_differences(self, recogniser):
        recogniser = recogniser.double().requires_grad_(False)
        chips = images(1, CHIP_SIZE).double().requires_grad_(True)
        direction = torch.randn(chips.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def value(x):
            return recogniser.embed_chips(x).square().sum()

        gradient = torch.autograd.grad(value(chips), chips)[0]
        step = 1e-7
        numeric = (value(chips + step * direction) - value(chips - step * direction)) / (2 * step)
        assert torch.allclose((gradient * direction).sum(), numeric, rtol=1e-4)

    def test_differentiable_twice_in_the_image(self, recogniser):
        x = images(1, 32).requires_grad_(True)
        distance = FaceRecogniser.distance(recogniser(x, cameras(5)), torch.zeros(1, 5)).sum()
        gradient = torch.autograd.grad(distance, x, create_graph=True)[0]
        second = torch.autograd.grad(gradient.square().sum(), x)[0]
        assert gradient.abs().sum() > 0 and second.abs().sum() > 0 and second.isfinite().all()

    def test_distance(self):
        a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
        assert FaceRecogniser.distance(a, b).tolist() == [5.0, 0.0]

    @pytest.mark.parametrize(
        "shape, count, message",
        [((2, 3, 32, 16), 2, "B, 3, H, H"), ((2, 1, 32, 32), 2, "B, 3, H, H"), ((2, 3, 32, 32), 1, "2 images need")],
    )
    def test_wrong_shapes(self, recogniser, shape, count, message):
        with pytest.raises(ValueError, match=message):
            recogniser(torch.zeros(shape), cameras(*[0] * count))

    def test_wrong_depths(self):
        with pytest.raises(ValueError, match="as many depths"):
            FaceRecogniser(widths=(4, 8), depths=(1,))


class TestFiles:
    def test_saved_and_loaded(self, recogniser, tmp_path):
        recogniser.save_pretrained(tmp_path)
        loaded = FaceRecogniser.from_pretrained(tmp_path)
        x, c = images(1, 64), cameras(0)
        assert torch.equal(loaded(x, c), recogniser(x, c))

    def test_reads_a_file_of_weights(self, tmp_path):
        network = FaceRecogniser()
        save_file({n: v.half() for n, v in network.state_dict().items()}, tmp_path / "a.safetensors")
        loaded = FaceRecogniser.from_weights_file(tmp_path / "a.safetensors")
        assert loaded.dtype == torch.float32 and not any(p.requires_grad for p in loaded.parameters())
        assert torch.allclose(loaded.fc.weight, network.fc.weight, atol=1e-3)

    def test_missing_or_other_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            FaceRecogniser.from_weights_file(tmp_path / "none.safetensors")
        save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match="does not hold"):
            FaceRecogniser.from_weights_file(tmp_path / "b.safetensors")
