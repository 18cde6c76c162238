"""One loss (Eq. 8-12): inference, training and evaluation build the same one, and a checkpoint records it."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from metaaux import MetaAuxInverter
from metaaux.baselines import MethodOptions, make_methods
from metaaux.evaluation.metrics import ReconstructionMetrics
from metaaux.losses import InversionLoss, LossWeights, _FirstHalf, perceptual_distance
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.perceptual import LPIPS, DiscriminatorPerceptualDistance
from metaaux.training.encoder import EncoderConfig, reconstruction_loss
from metaaux.training.phases import AuxiliaryConfig, load_networks

WEIGHTS = {"mse": 1.0, "perceptual": 0.3, "identity": 0.2, "adversarial": 0.01}


@pytest.fixture(scope="module")
def lpips():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        network = LPIPS("squeeze", calibrated=True)
        for layer in network.calibration:
            layer.weight.data.uniform_(0, 1)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair(batch):
    """Reconstructions, raw images, photos, cameras."""
    photos, cameras = batch
    images = (photos.roll(1, 0) + 0.1 * photos).clamp(-1, 1)
    return images, F.avg_pool2d(images, 4), photos, cameras


def settings(folder, perceptual=None, outer_perceptual=None) -> AuxiliaryConfig:
    """A meta phase on the networks of a saved pipeline, with its loss."""
    names = ("generator", "encoder", "discriminator", "identity")
    return AuxiliaryConfig(
        phase="meta",
        networks={name: str(folder / name) for name in names} | {"perceptual": perceptual},
        data={"path": "none"},
        inner={"loss": WEIGHTS},
        outer={"loss": WEIGHTS, "perceptual": outer_perceptual},
        run={"total_images": 1, "interval_images": 1},
    )


@pytest.mark.parametrize("kind", ["discriminator", "lpips-squeeze"])
def test_pipeline_meta_phase_and_evaluation_compute_the_same_loss(tiny_components, lpips, pair, kind, tmp_path):
    perceptual = lpips if kind == "lpips-squeeze" else None
    weights = {f"weight_{name}": value for name, value in WEIGHTS.items() if name != "mse"}
    MetaAuxInverter(**tiny_components, perceptual=perceptual, **weights).save_pretrained(tmp_path)
    inverter = MetaAuxInverter.from_pretrained(tmp_path)
    place = str(tmp_path / "perceptual") if perceptual is not None else None
    networks = load_networks(settings(tmp_path, perceptual=place), torch.device("cpu"))
    method = make_methods(["metaaux"], inverter, MethodOptions())[0]

    image, image_raw, photo, camera = pair
    expected = inverter.inversion_loss()(image, image_raw, photo, camera)
    for loss in (networks.inner_loss, networks.outer_loss, method.loss):
        assert loss.describe() == {"weights": WEIGHTS, "perceptual": kind, "identity": "IdentityNetwork"}
        assert loss.terms == ("mse", "perceptual", "identity", "adversarial")
        for name, value in loss(image, image_raw, photo, camera).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    metrics = ReconstructionMetrics(inverter)
    for index, figures in enumerate(metrics.measure(image, photo)):
        assert figures["mse"] == pytest.approx(expected["mse"][index].item(), rel=1e-6)
        assert figures["perceptual"] == pytest.approx(expected["perceptual"][index].item(), rel=1e-5)
        assert figures["identity"] == pytest.approx(1 - expected["identity"][index].item(), abs=1e-6)
    # The two kinds of checkpoint do have different losses.
    other = DiscriminatorPerceptualDistance(inverter.discriminator) if perceptual is not None else lpips
    assert (other(image, photo) - expected["perceptual"]).abs().min() > 1e-3


def test_an_objective_may_have_a_distance_of_its_own(tiny_folder, lpips, pair, tmp_path):
    lpips.save_pretrained(tmp_path / "lpips")
    networks = load_networks(settings(tiny_folder, outer_perceptual=str(tmp_path / "lpips")), torch.device("cpu"))
    assert networks.inner_loss.describe()["perceptual"] == "discriminator"
    assert networks.outer_loss.describe()["perceptual"] == "lpips-squeeze"


def test_a_checkpoint_used_with_another_loss_than_in_training_says_so(tiny_components, lpips, tmp_path):
    config = {k: v for k, v in tiny_components["auxiliary"].config.items() if not k.startswith("_")}
    recorded = MetaAuxInverter(**tiny_components).inversion_loss().describe()
    auxiliary = AuxiliaryNetwork(**config | {"inner_loss": recorded}).eval()
    parts = tiny_components | {"auxiliary": auxiliary}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MetaAuxInverter(**parts).save_pretrained(tmp_path)
        MetaAuxInverter.from_pretrained(tmp_path)
        MetaAuxInverter(**tiny_components, weight_perceptual=0.1)  # nothing is recorded: as older checkpoints
    assert json.loads((tmp_path / "auxiliary" / "config.json").read_text())["inner_loss"] == recorded
    with pytest.warns(UserWarning, match="'perceptual': 'discriminator'.* in training, .*'lpips-squeeze'.* here"):
        MetaAuxInverter(**parts, perceptual=lpips)
    with pytest.warns(UserWarning, match="learnt for another loss"):
        MetaAuxInverter(**parts, weight_identity=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [False, True])
def test_the_encoders_loss_is_eq_8_without_its_adversarial_term(
    tiny_components, tiny_folder, pair, tmp_path, dtype, features
):
    """Equal to its terms as they are defined, networks in the training's precision."""
    distance = DiscriminatorPerceptualDistance(tiny_components["discriminator"], dtype=dtype)
    if features:
        distance = LPIPS("squeeze", normalization="folded").eval().requires_grad_(False)
        distance.save_pretrained(tmp_path / "features")
    run = {"total_images": 1, "interval_images": 1}
    config = EncoderConfig(
        networks={
            "generator": "none",
            "discriminator": str(tiny_folder / "discriminator"),
            "perceptual": str(tmp_path / "features") if features else None,
            "identity": str(tiny_folder / "identity"),
        },
        data={"path": "none"},
        loss={"mse": 0.9, "perceptual": 0.3, "identity": 0.2},
        run=run,
    )
    loss = reconstruction_loss(config, torch.device("cpu"), dtype)
    image, _, photo, camera = pair
    losses = loss(image, None, photo, camera)
    assert loss.terms == ("mse", "perceptual", "identity")
    identity = tiny_components["identity"]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        perceptual = distance(image, photo)
        cosine = (identity(image) * identity(photo)).sum(dim=1)
    torch.testing.assert_close(losses["mse"], (image - photo).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(losses["perceptual"], perceptual)
    torch.testing.assert_close(losses["identity"], 1 - cosine, atol=1e-6, rtol=0)
    total = 0.9 * losses["mse"] + 0.3 * losses["perceptual"] + 0.2 * losses["identity"]
    torch.testing.assert_close(losses["total"], total)
    without = EncoderConfig(networks={"generator": "none"}, data={"path": "none"}, loss={"perceptual": 0.0}, run=run)
    assert reconstruction_loss(without, torch.device("cpu"), dtype).terms == ("mse",)


def test_the_identity_network_is_told_the_camera(tiny_components, pair):
    class Compass(torch.nn.Module):
        """The vector that points where the camera stands, whatever the picture shows."""

        def forward(self, image, cameras):
            return F.normalize(cameras[:, [3, 7, 11]], dim=1)

    image, _, photo, camera = pair
    loss = InversionLoss(LossWeights(perceptual=0, identity=1.0, adversarial=0), None, Compass(), None)
    assert loss.describe()["identity"] == "Compass"
    torch.testing.assert_close(loss(image, None, photo, camera)["identity"], torch.zeros(3), atol=1e-6, rtol=0)
    other = loss.reference(photo, camera.roll(1, 0))
    assert (loss(image, None, other, camera)["identity"] > 1e-3).all()


@pytest.mark.parametrize("case", ["one batch", "another size", "2D"])
def test_one_pass_gives_features_and_logits_as_two_do(tiny_components, pair, case):
    image, image_raw, photo, camera = pair
    discriminator = tiny_components["discriminator"]
    if case == "2D":
        config = {name: value for name, value in discriminator.config.items() if not name.startswith("_")}
        discriminator = DualDiscriminator(**config | {"dual": False}).eval().requires_grad_(False)
    raw_size = image_raw.shape[-1] // (2 if case == "another size" else 1)
    weights = LossWeights(identity=0, flip_perceptual=0.5, flip_adversarial=0.1)
    results = []
    for network in (discriminator, copy.deepcopy(discriminator)):
        distance = DiscriminatorPerceptualDistance(network, raw_size)
        loss = InversionLoss(weights, distance, None, discriminator)
        images = [image.clone().requires_grad_(), image_raw.clone().requires_grad_()]
        with FlopCounterMode(display=False) as counter:
            terms = loss(*images, photo, camera)
            flip = loss.flip(*images, photo.flip(-1), camera)
        gradients = torch.autograd.grad((terms["total"] + flip).sum(), images, allow_unused=case == "2D")
        results.append(({**terms, "flip": flip}, gradients, counter.get_total_flops()))
    (one, first, fewer), (two, second, more) = results
    assert (fewer < more) == (case == "2D")
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)


def test_gradients_of_half_a_batch_keep_their_layout():
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.equal(_FirstHalf.apply(x), x[:2])
    torch.autograd.gradcheck(_FirstHalf.apply, x)
    torch.autograd.gradgradcheck(_FirstHalf.apply, x)
    (gradient,) = torch.autograd.grad(_FirstHalf.apply(x).square().sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_distance_needs_a_network():
    with pytest.raises(ValueError, match="perceptual network or a discriminator"):
        perceptual_distance(None, None)
