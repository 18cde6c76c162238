"""The loss (Eq. 8-12) and the inner loop (Eq. 5)."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from metaaux.adaptation import InnerLoop, InnerProblem, adapt, gradient_step
from metaaux.cameras import mirror_camera
from metaaux.losses import InversionLoss, LossWeights
from metaaux.models.perceptual import DiscriminatorPerceptualDistance
from metaaux.models.views import private_view
from metaaux.tasks import Tasks, make_tasks, predict_tasks


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose more by handing work over than a second thread wins."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case(tiny_components):
    """Arguments of `adapt`, two photos and their cameras."""
    from metaaux.cameras import camera_from_pose

    parts = tiny_components
    seed = torch.Generator().manual_seed(5)
    size = parts["generator"].config.image_size
    target = F.interpolate(torch.rand(2, 3, 4, 4, generator=seed) * 2 - 1, size=(size, size), mode="bicubic")
    distance = DiscriminatorPerceptualDistance(parts["discriminator"])
    return SimpleNamespace(
        generator=parts["generator"],
        auxiliary=parts["auxiliary"],
        discriminator=parts["discriminator"],
        identity=parts["identity"],
        distance=distance,
        loss=InversionLoss(LossWeights(), distance, parts["identity"], parts["discriminator"]),
        target=target.clamp(-1, 1),
        w=torch.randn(1, parts["generator"].config.w_dim, generator=seed),
        camera=torch.stack([camera_from_pose(8, 0), camera_from_pose(-15, 5)]),
    )


def run(case, photos=1, **options):
    options = {"steps": 2, "learning_rate": 1e-3, **options}
    loss = options.pop("loss", case.loss)
    return adapt(case.generator, case.auxiliary, loss, case.target[:photos], case.w, case.camera[:photos], **options)


def test_terms_and_total(case):
    weights = LossWeights(mse=2.0, perceptual=0.3, identity=0.7, adversarial=0.11)
    loss = InversionLoss(weights, case.distance, case.identity, case.discriminator)
    image, raw = case.target.flip(0), F.avg_pool2d(case.target, 4)
    losses = loss(image, raw, case.target, case.camera)
    torch.testing.assert_close(losses["mse"], (image - case.target).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(losses["perceptual"], case.distance(image, case.target))
    cosine = (case.identity(image) * case.identity(case.target)).sum(1)
    torch.testing.assert_close(losses["identity"], 1 - cosine)
    for i in range(2):  # one at a time: the discriminator's minibatch deviation would couple them
        logit = case.discriminator(image[i : i + 1], raw[i : i + 1], case.camera[i : i + 1])
        torch.testing.assert_close(losses["adversarial"][i], torch.log1p(torch.exp(-logit))[0, 0])
    total = 2 * losses["mse"] + 0.3 * losses["perceptual"] + 0.7 * losses["identity"] + 0.11 * losses["adversarial"]
    torch.testing.assert_close(losses["total"], total)


def test_a_photos_loss_does_not_depend_on_the_others_of_the_batch(case):
    raw = F.avg_pool2d(case.target, 4)
    together = case.loss(case.target.flip(0), raw, case.target, case.camera)
    for i in range(2):
        part = slice(i, i + 1)
        alone = case.loss(case.target.flip(0)[part], raw[part], case.target[part], case.camera[part])
        for name, value in alone.items():
            torch.testing.assert_close(together[name][part], value)


def test_a_perfect_reconstruction_costs_only_the_adversarial_term(case):
    losses = case.loss(case.target, F.avg_pool2d(case.target, 4), case.target, case.camera)
    for name in ("mse", "perceptual", "identity"):
        torch.testing.assert_close(losses[name], torch.zeros(2), atol=1e-5, rtol=0)
    assert (losses["adversarial"] > 0).all()


def test_missing_network_and_shape_errors(case):
    with pytest.raises(ValueError, match="identity"):
        InversionLoss(LossWeights(), case.distance, None, case.discriminator)
    weights = LossWeights(perceptual=0, identity=0, adversarial=0)
    losses = InversionLoss(weights, None, None, None)(case.target.flip(0), None, case.target, case.camera)
    assert torch.equal(losses["total"], losses["mse"])
    assert not losses["perceptual"].any()
    with pytest.raises(ValueError, match="differ in shape"):
        case.loss(case.target[..., :16], None, case.target, case.camera)


def test_flip_loss_sees_the_mirrored_camera(case):
    weights = LossWeights(flip_perceptual=0.5, flip_adversarial=0.25)
    loss = InversionLoss(weights, case.distance, case.identity, case.discriminator)
    result = run(case, steps=1, loss=loss, photos=1)
    with torch.no_grad():
        camera = mirror_camera(case.camera[:1])
        view = case.generator.synthesize(case.w, camera)
        flipped = case.target[:1].flip(-1)
        logit = case.discriminator(view.image, view.image_raw, camera)
        expected = 0.5 * case.distance(view.image, flipped) + 0.25 * F.softplus(-logit[:, 0])
    assert result.steps[0]["flip"] == pytest.approx(expected.item(), rel=1e-5)
    terms = result.steps[0]
    base = terms["mse"] + 0.8 * terms["perceptual"] + 0.1 * terms["identity"] + 0.005 * terms["adversarial"]
    assert terms["total"] == pytest.approx(base + terms["flip"], rel=1e-5)
    assert "flip" not in run(case, steps=0).steps[0]


def test_flip_loss_in_the_first_steps_alone(case):
    loss = InversionLoss(LossWeights(flip_perceptual=0.5), case.distance, case.identity, case.discriminator)
    shared = run(case, steps=3, loss=loss, flip_share=0.6).steps
    assert ["flip" in step for step in shared] == [True, True, True, False, False]
    # Up to there it is as ever; a step without the loss leads elsewhere.
    whole = run(case, steps=3, loss=loss).steps
    assert all("flip" in step for step in whole)
    assert [step["mse"] for step in shared[:4]] == [step["mse"] for step in whole[:4]]
    assert shared[4]["mse"] != whole[4]["mse"]
    assert shared[3]["total"] == pytest.approx(whole[3]["total"] - whole[3]["flip"], rel=1e-6)
    few = run(case, steps=1, loss=loss, flip_share=0.1).steps
    assert "flip" in few[1]
    for wrong in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="flip_share"):
            run(case, flip_share=wrong)


def test_gradient_step_is_eq_5_and_clips_by_task():
    parameters = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])}
    gradients = {"a": torch.tensor([[3.0, 0.0], [0.0, 0.3]]), "b": torch.tensor([4.0, 0.4])}
    rates = {"a": 0.1, "b": torch.tensor(0.01)}
    plain, velocity = gradient_step(parameters, gradients, rates)
    torch.testing.assert_close(plain["a"], torch.tensor([[0.7, 2.0], [3.0, 3.97]]))
    torch.testing.assert_close(plain["b"], torch.tensor([4.96, 5.996]))
    again, _ = gradient_step(plain, gradients, rates, momentum=0.5, velocity=velocity)
    torch.testing.assert_close(again["a"], plain["a"] - 0.1 * 1.5 * gradients["a"])
    numbers, _ = gradient_step(plain, gradients, {"a": 0.1, "b": 0.01}, momentum=0.5, velocity=velocity)
    torch.testing.assert_close(numbers, again)
    # Of two stacked tasks the first's gradient has norm 5, the second's 0.5, which is below the limit.
    clipped, _ = gradient_step(parameters, gradients, rates, max_gradient_norm=1.0)
    torch.testing.assert_close(clipped["a"], torch.tensor([[0.94, 2.0], [3.0, 3.97]]))
    torch.testing.assert_close(clipped["b"], torch.tensor([4.992, 5.996]))
    # All numbers as one task's.
    parameters, gradients = ({n: t[None] for n, t in tensors.items()} for tensors in (parameters, gradients))
    whole, _ = gradient_step(parameters, gradients, rates, max_gradient_norm=1.0)
    moved = torch.cat([((parameters[n] - whole[n]) / rates[n]).flatten() for n in parameters])
    assert moved.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_steps_and_callback(case):
    seen = []
    result = run(case, steps=3, on_step=lambda step, image, losses: seen.append((step, image, losses)))
    assert [step for step, _, _ in seen] == [-1, 0, 1, 2, 3]
    assert [entry for _, _, entry in seen] == result.steps
    assert all(entry["seconds"] > 0 for entry in result.steps)
    with torch.no_grad():
        encoder_alone = case.generator.synthesize(case.w, case.camera[:1]).image
        planes = case.generator.planes(case.w)
        output = case.auxiliary(case.target[:1], case.camera[:1], planes)
        prediction = case.generator.synthesize(
            case.w, case.camera[:1], output.weight_offsets, output.offset_planes
        ).image
        final = case.generator.synthesize(case.w, case.camera[:1], result.weight_offsets, result.offset_planes).image
    torch.testing.assert_close(seen[0][1], encoder_alone)
    torch.testing.assert_close(seen[1][1], prediction)
    torch.testing.assert_close(result.image, final)
    assert torch.equal(seen[-1][1], result.image)
    assert not torch.equal(encoder_alone, prediction)
    assert result.steps[0]["mse"] == pytest.approx((encoder_alone - case.target[:1]).square().mean().item())


def test_loss_falls_over_five_steps(case):
    totals = [entry["total"] for entry in run(case, steps=5, learning_rate=1e-2).steps[1:]]
    assert all(later < earlier for earlier, later in zip(totals, totals[1:], strict=False))
    assert totals[-1] < 0.99 * totals[0]


def test_first_step_follows_the_gradient_with_rates_by_tensor(case):
    network = private_view(case.auxiliary)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in network.adaptable_parameters().items()}
    rates = {name: 1e-3 * (1 + i % 3) for i, name in enumerate(leaves)}
    output = torch.func.functional_call(
        network, leaves, (case.target[:1], case.camera[:1], case.generator.planes(case.w))
    )
    view = case.generator.synthesize(case.w, case.camera[:1], output.weight_offsets, output.offset_planes)
    case.loss(view.image, view.image_raw, case.target[:1], case.camera[:1])["total"].sum().backward()
    result = run(case, steps=1, learning_rate=None, learning_rates=rates)
    for name, leaf in leaves.items():
        torch.testing.assert_close(result.parameters[name], leaf.detach() - rates[name] * leaf.grad)
    with pytest.raises(ValueError, match="lacks 1"):
        run(case, learning_rates={name: 0.1 for name in list(rates)[1:]})


def test_default_rates_are_the_networks_own(case):
    rates = {name: rate.item() for name, rate in case.auxiliary.inner_rates().items()}
    own = run(case, learning_rate=None)
    given = run(case, learning_rate=None, learning_rates=rates)
    assert [s["total"] for s in own.steps] == pytest.approx([s["total"] for s in given.steps])


def test_nothing_shared_changes(case):
    modules = (case.generator, case.auxiliary, case.discriminator, case.identity)
    before = [{n: t.clone() for n, t in module.state_dict().items()} for module in modules]
    tensors = [dict(module.named_parameters()) for module in modules]
    case.auxiliary.train()
    try:
        result = run(case)
        assert case.auxiliary.training
    finally:
        case.auxiliary.eval()
    for module, state, own in zip(modules, before, tensors, strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert all(parameter is own[name] for name, parameter in module.named_parameters())
        assert all(parameter.grad is None for parameter in module.parameters())
    shared = case.auxiliary.adaptable_parameters()
    assert any(not torch.equal(parameter, shared[name]) for name, parameter in result.parameters.items())
    assert case.discriminator.config.deviation_group == 4


def test_batch_statistics_are_not_used(case):
    """A network left in training mode adapts as one in eval mode does."""
    expected = run(case).image
    case.auxiliary.train()
    try:
        assert torch.equal(run(case).image, expected)
    finally:
        case.auxiliary.eval()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(case, context):
    expected = run(case)
    with context():
        inner = SimpleNamespace(**{**vars(case), "target": case.target + 0, "w": case.w + 0})
        result = run(inner)
        assert not torch.is_grad_enabled()
    assert torch.equal(result.image, expected.image)
    assert not result.image.requires_grad and not result.image.is_inference()


def test_threads_get_what_each_would_get_alone(case):
    def person(index):
        return adapt(
            case.generator,
            case.auxiliary,
            case.loss,
            case.target[index : index + 1],
            case.w,
            case.camera[index : index + 1],
            steps=3,
            learning_rate=3e-3,
        )

    def in_threads(indices):
        results = {}
        barrier = threading.Barrier(len(indices))

        def work(key, index):
            torch.set_num_threads(1)
            barrier.wait()
            results[key] = person(index)

        threads = [threading.Thread(target=work, args=item) for item in enumerate(indices)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[key] for key in range(len(indices))]

    alone = [in_threads([index])[0] for index in (0, 1)]
    together = in_threads([0, 1, 0])
    for result, expected in zip(together, (alone[0], alone[1], alone[0]), strict=True):
        assert torch.equal(result.image, expected.image)
        for name, offset in expected.weight_offsets.items():
            assert torch.equal(result.weight_offsets[name], offset)
        for name, parameter in expected.parameters.items():
            assert torch.equal(result.parameters[name], parameter)
    assert not torch.equal(alone[0].image, alone[1].image)


def test_several_photos_of_one_person(case):
    result = run(case, photos=2, steps=1)
    assert result.image.shape == case.target.shape
    assert result.offset_planes.shape[0] == 1
    with torch.no_grad():
        views = case.generator.synthesize(case.w.expand(2, -1), case.camera)
        losses = case.loss(views.image, views.image_raw, case.target, case.camera)
    assert result.steps[0]["total"] == pytest.approx(losses["total"].mean().item(), rel=1e-4)
    # The same photo twice asks for what the photo alone asks for.
    single = run(case, photos=1, steps=2)
    double = SimpleNamespace(**{**vars(case), "target": case.target[[0, 0]], "camera": case.camera[[0, 0]]})
    twice = run(double, photos=2, steps=2)
    torch.testing.assert_close(twice.image[:1], single.image, atol=1e-4, rtol=1e-4)


def test_without_a_3d_module(case):
    from metaaux.models.auxiliary import AuxiliaryNetwork

    config = {k: v for k, v in case.auxiliary.config.items() if not k.startswith("_")}
    plain = AuxiliaryNetwork(**{**config, "use_offset_planes": False})
    result = run(SimpleNamespace(**{**vars(case), "auxiliary": plain}), steps=1)
    assert result.offset_planes is None
    assert result.steps[2]["total"] < result.steps[1]["total"]


def test_rejects_inputs_that_do_not_fit(case):
    def changed(**values):
        return SimpleNamespace(**{**vars(case), **values})

    with pytest.raises(ValueError, match="target is"):
        run(changed(target=case.target[..., :16]))
    with pytest.raises(ValueError, match="camera is"):
        run(changed(camera=case.camera[:, :24]))
    with pytest.raises(ValueError, match="average the codes"):
        run(changed(w=case.w.expand(2, -1)), photos=2)
    with pytest.raises(ValueError, match="steps is -1"):
        run(case, steps=-1)
    with pytest.raises(FloatingPointError, match="learning rate"):
        run(case, learning_rate=1e30)


# ------------------------------------------------------------------------------------------------ batches of tasks


def as_tasks(parts, photos, loss, inner, indices):
    """The inner loop of some of the persons, whose `photos` each stand together: adapted parameters, what was seen."""
    rows = torch.cat([torch.arange(i * photos, (i + 1) * photos) for i in indices])
    w = parts.w[indices]
    tasks = Tasks(parts.target[rows], parts.camera[rows], w, parts.generator.planes(w))
    leaves = {n: p.detach().clone().requires_grad_() for n, p in parts.auxiliary.adaptable_parameters().items()}
    problem = InnerProblem(parts.generator, parts.auxiliary, loss, tasks, inner)
    adapted, seen = problem.run(leaves)
    offsets = predict_tasks(parts.auxiliary, adapted, tasks)
    return adapted, seen, offsets, problem.evaluate(inner.steps, offsets)


@pytest.fixture(scope="module")
def persons(case):
    """Three persons with two photos each."""
    from metaaux.cameras import camera_from_pose

    seed = torch.Generator().manual_seed(8)
    size = case.generator.config.image_size
    target = F.interpolate(torch.rand(6, 3, 4, 4, generator=seed) * 2 - 1, size=(size, size), mode="bicubic")
    return SimpleNamespace(
        **{
            **vars(case),
            "target": target.clamp(-1, 1),
            "w": torch.randn(3, case.generator.config.w_dim, generator=seed),
            "camera": torch.stack([camera_from_pose(yaw, 2) for yaw in (-20, -10, 0, 5, 15, 25)]),
        }
    )


@pytest.mark.parametrize("photos", [1, 2])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_person_comes_out_of_a_batch_of_tasks_as_alone(persons, photos, differentiable):
    """To rounding in float32, with flip loss, clipping, momentum and several photos a person."""
    weights = LossWeights(flip_perceptual=0.2, flip_adversarial=0.01)
    loss = InversionLoss.from_components(weights, persons.discriminator, persons.identity)
    rates = dict.fromkeys(persons.auxiliary.adaptable_parameters(), 1e-3)
    inner = InnerLoop(
        3, rates, max_gradient_norm=0.5, momentum=0.4, flip_share=0.5, differentiable=differentiable, losses=True
    )
    together = as_tasks(persons, photos, loss, inner, [0, 1, 2])
    for index in range(3):
        alone = as_tasks(persons, photos, loss, inner, [index])
        rows = slice(index * photos, (index + 1) * photos)
        for name, parameter in alone[0].items():
            torch.testing.assert_close(together[0][name][index], parameter[0], atol=2e-6, rtol=1e-4)
        for one, other in zip(alone[1], together[1], strict=True):
            torch.testing.assert_close(other.image[rows], one.image, atol=1e-5, rtol=1e-4)
            assert one.losses.keys() == other.losses.keys()
            for term, value in one.losses.items():
                torch.testing.assert_close(other.losses[term][index], value[0], atol=1e-6, rtol=1e-4)
        for layer, offset in alone[2].weight_offsets.items():
            torch.testing.assert_close(together[2].weight_offsets[layer][index], offset[0], atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(together[2].offset_planes[index], alone[2].offset_planes[0], atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(together[3][0].image[rows], alone[3][0].image, atol=1e-5, rtol=1e-4)
    assert ["flip" in step.losses for step in together[1]] == [True, True, False]
    means = [step.loss.item() for step in together[1]]
    assert means == pytest.approx([step.losses["total"].mean().item() for step in together[1]], rel=1e-5)


@pytest.mark.parametrize("photos", [1, 2])
def test_a_visitors_photos_are_a_batch_of_one_task(persons, photos):
    """`adapt` is the inner loop of training."""
    auxiliary = private_view(persons.auxiliary)
    auxiliary.register_to_config(inner_max_gradient_norm=0.5, inner_momentum=0.4)
    parts = SimpleNamespace(**{**vars(persons), "auxiliary": auxiliary})
    loss = InversionLoss.from_components(LossWeights(flip_perceptual=0.2), parts.discriminator, parts.identity)
    result = adapt(
        parts.generator, auxiliary, loss, parts.target[:photos], parts.w[:1], parts.camera[:photos], steps=2
    )
    rates = {name: rate.item() for name, rate in auxiliary.inner_rates().items()}
    adapted, seen, offsets, last = as_tasks(parts, photos, loss, InnerLoop.of(auxiliary, 2, rates=rates), [0])
    assert {name: list(parameter.shape) for name, parameter in result.parameters.items()} == {
        name: list(parameter.shape) for name, parameter in auxiliary.adaptable_parameters().items()
    }
    for name, parameter in result.parameters.items():
        torch.testing.assert_close(adapted[name][0], parameter, atol=0, rtol=0)
    for layer, offset in result.weight_offsets.items():
        torch.testing.assert_close(offsets.weight_offsets[layer][0], offset, atol=1e-7, rtol=1e-6)
    for entry, step in zip(result.steps[1:3], seen, strict=True):
        assert {name: value.item() for name, value in step.losses.items()} == {
            name: entry[name] for name in step.losses
        }
    torch.testing.assert_close(result.image, last[0].image, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_tasks_of_a_2d_generator(tiny_2d_inverter, batch, count):
    """No planes: side by side and alone they come out alike, and adaptation works."""
    inverter = tiny_2d_inverter
    image, camera = batch
    tasks = make_tasks(inverter.generator, inverter.encoder, image[:count], camera[:count])
    assert tasks.planes is None and [len(part) for part in tasks.split(2)] == ([2, 1] if count == 3 else [1])
    loss = inverter.inversion_loss()
    inner = InnerLoop.of(inverter.auxiliary, 3)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in inverter.auxiliary.adaptable_parameters().items()}
    adapted, seen = InnerProblem(inverter.generator, inverter.auxiliary, loss, tasks, inner).run(leaves)
    assert (seen[-1].losses["total"] < seen[0].losses["total"]).all()
    for index in range(count):
        part = slice(index, index + 1)
        alone = adapt(inverter.generator, inverter.auxiliary, loss, image[part], tasks.w[part], camera[part], steps=3)
        for name, parameter in alone.parameters.items():
            torch.testing.assert_close(adapted[name][index], parameter, atol=2e-6, rtol=1e-4)
        assert seen[2].losses["total"][index].item() == pytest.approx(alone.steps[3]["total"], rel=1e-4)
    with pytest.raises(ValueError, match="no rays"):
        InnerProblem(inverter.generator, inverter.auxiliary, loss, tasks, InnerLoop(1, inner.rates, resolution=8)).run(
            leaves
        )


def test_tasks_need_stored_batch_statistics(case):
    tasks = Tasks(case.target, case.camera, case.w.expand(2, -1), None)
    network = private_view(case.auxiliary).train()
    with pytest.raises(ValueError, match="training mode"):
        InnerProblem(case.generator, network, case.loss, tasks, InnerLoop.of(network, 1))
