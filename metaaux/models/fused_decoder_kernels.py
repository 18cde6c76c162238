"""The Triton kernels of `fused_decoder`, which imports them where Triton is: decoding, and its three ways back.

`features_backward` and `inputs_backward` go back to planes, offset planes and points, by way of the planes' sum;
`weights_backward` to the decoder's weights and biases.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triplane_cuda import load_points, look_up, look_up_backward, rows_of, softplus, store_points


@triton.jit
def _column(matrix, c, INDEX: tl.constexpr):
    return tl.sum(tl.where((c == INDEX)[None, :], matrix, 0.0), axis=1)


@triton.jit
def _displaced(
    offsets, x, y, z, live, height, width, scale, AXES: tl.constexpr, OFFSETS: tl.constexpr, M: tl.constexpr
):
    """Eq. 4: Δp is the sum of the look-ups, in world units."""
    if OFFSETS:
        c = tl.arange(0, 4)
        moved = look_up(offsets, x, y, z, live, height, width, AXES, 4, 4, M) * scale
        x += _column(moved, c, 0)
        y += _column(moved, c, 1)
        z += _column(moved, c, 2)
    return x, y, z


@triton.jit
def _features(
    points,
    planes,
    offsets,
    batch,
    live,
    rows,
    sizes,
    scale,
    AXES: tl.constexpr,
    OFFSETS: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    M: tl.constexpr,
):
    """What the decoder reads of samples, [M, SIDE]: the planes' mean in their dtype."""
    height, width, offset_height, offset_width = sizes
    x, y, z = load_points(points, rows, live, scale)
    offsets += batch * offset_height * offset_width * 12
    x, y, z = _displaced(offsets, x, y, z, live, offset_height, offset_width, scale, AXES, OFFSETS, M)
    total = look_up(planes + batch * height * width * 3 * C, x, y, z, live, height, width, AXES, C, SIDE, M)
    return (total / 3).to(planes.dtype.element_ty)


@triton.jit
def _store_sums(sums, w, rest, b, first, colours, sigma, SIDE: tl.constexpr, WIDE: tl.constexpr):
    """To this program's row of the sums that `fused_decoder` adds up."""
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    c = tl.arange(0, SIDE)
    h = tl.arange(0, WIDE)
    sums += program * (2 * WIDE * SIDE + 2 * WIDE + 2 * SIDE)
    tl.store(sums + h[:, None] * SIDE + c[None, :], w)
    sums += WIDE * SIDE
    tl.store(sums + c[:, None] * WIDE + h[None, :], rest)
    sums += WIDE * SIDE
    tl.store(sums + h, b)
    tl.store(sums + WIDE + h, first)
    tl.store(sums + 2 * WIDE + c, colours)
    tl.store(sums + 2 * WIDE + SIDE + c, tl.where(c == 0, tl.sum(sigma, axis=0), 0.0))


@triton.jit
def _hidden_layer(
    features,
    weight,
    bias,
    gains,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Hidden units before activation [M, WIDE] in float32; zero beyond H."""
    c = tl.arange(0, SIDE)
    h = tl.arange(0, WIDE)
    mask = (c < C)[:, None] & (h < H)[None, :]
    w = tl.load(weight + h[None, :] * C + c[:, None], mask=mask, other=0.0).to(tl.float32) * gains[0]
    b = tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32) * gains[1]
    return tl.dot(features, w.to(features.dtype), input_precision=PRECISION) + b[None, :]


@triton.jit
def _density_weight(weight, gain, H: tl.constexpr, WIDE: tl.constexpr):
    h = tl.arange(0, WIDE)
    return tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32) * gain


@triton.jit
def _units_backward(
    units,
    sigma,
    colours,
    weight,
    gain,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the gradients of density [M] and colours [M, SIDE] to that of hidden units before activation."""
    c = tl.arange(0, SIDE)
    h = tl.arange(0, WIDE)
    mask = (c < C)[:, None] & (h < H)[None, :]
    rest = tl.load(weight + H + c[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32) * gain
    slope = tl.dot(colours, rest.to(colours.dtype), input_precision=PRECISION)
    slope += sigma[:, None] * _density_weight(weight, gain, H, WIDE)[None, :]
    return slope * tl.sigmoid(units)


@triton.jit
def forward(
    points,
    planes,
    offsets,
    hidden_weight,
    hidden_bias,
    last_weight,
    last_bias,
    density,
    logits,
    samples,
    height,
    width,
    offset_height,
    offset_width,
    scale,
    hidden_weight_gain,
    hidden_bias_gain,
    gain,
    last_bias_gain,
    AXES: tl.constexpr,
    OFFSETS: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, live, rows = rows_of(tl.program_id(0), samples, M)
    c = tl.arange(0, SIDE)
    h = tl.arange(0, WIDE)
    dtype = planes.dtype.element_ty
    sizes = height, width, offset_height, offset_width
    gains = hidden_weight_gain, hidden_bias_gain
    features = _features(points, planes, offsets, batch, live, rows, sizes, scale, AXES, OFFSETS, C, SIDE, M)
    units = _hidden_layer(features, hidden_weight, hidden_bias, gains, C, SIDE, H, WIDE, PRECISION)
    hidden = softplus(units).to(dtype)
    sigma = tl.sum(hidden.to(tl.float32) * _density_weight(last_weight, gain, H, WIDE)[None, :], axis=1)
    tl.store(density + rows, sigma + tl.load(last_bias).to(tl.float32) * last_bias_gain, mask=live)
    mask = (h < H)[:, None] & (c < C)[None, :]
    w = tl.load(last_weight + H + c[None, :] * H + h[:, None], mask=mask, other=0.0).to(tl.float32) * gain
    b = tl.load(last_bias + 1 + c, mask=c < C, other=0.0).to(tl.float32) * last_bias_gain
    colours = tl.dot(hidden, w.to(dtype), input_precision=PRECISION) + b[None, :]
    mask = live[:, None] & (c < C)[None, :]
    tl.store(logits + rows[:, None] * C + c[None, :], colours.to(dtype), mask=mask)


@triton.jit
def features_backward(
    points,
    planes,
    offsets,
    hidden_weight,
    hidden_bias,
    last_weight,
    grad_density,
    grad_logits,
    grad_features,
    samples,
    height,
    width,
    offset_height,
    offset_width,
    scale,
    hidden_weight_gain,
    hidden_bias_gain,
    gain,
    AXES: tl.constexpr,
    OFFSETS: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """To the gradient of the planes' sum, [B, M, C]."""
    batch, live, rows = rows_of(tl.program_id(0), samples, M)
    c = tl.arange(0, SIDE)
    h = tl.arange(0, WIDE)
    dtype = planes.dtype.element_ty
    sizes = height, width, offset_height, offset_width
    gains = hidden_weight_gain, hidden_bias_gain
    features = _features(points, planes, offsets, batch, live, rows, sizes, scale, AXES, OFFSETS, C, SIDE, M)
    units = _hidden_layer(features, hidden_weight, hidden_bias, gains, C, SIDE, H, WIDE, PRECISION)
    mask = live[:, None] & (c < C)[None, :]
    place = rows[:, None] * C + c[None, :]
    colours = tl.load(grad_logits + place, mask=mask, other=0.0)
    sigma = tl.load(grad_density + rows, mask=live, other=0.0)
    units = _units_backward(units, sigma, colours, last_weight, gain, C, SIDE, H, WIDE, PRECISION)
    w_mask = (h < H)[:, None] & (c < C)[None, :]
    w = tl.load(hidden_weight + h[:, None] * C + c[None, :], mask=w_mask, other=0.0).to(tl.float32) * gains[0]
    gradient = tl.dot(units.to(dtype), w.to(dtype), input_precision=PRECISION) / 3
    tl.store(grad_features + place, gradient, mask=mask)


@triton.jit
def weights_backward(
    points,
    planes,
    offsets,
    hidden_weight,
    hidden_bias,
    last_weight,
    grad_density,
    grad_logits,
    sums,
    samples,
    height,
    width,
    offset_height,
    offset_width,
    scale,
    hidden_weight_gain,
    hidden_bias_gain,
    gain,
    AXES: tl.constexpr,
    OFFSETS: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    H: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What this program's samples add to the gradients of weights and biases."""
    c = tl.arange(0, SIDE)
    sizes = height, width, offset_height, offset_width
    gains = hidden_weight_gain, hidden_bias_gain
    sum_w = tl.zeros((WIDE, SIDE), tl.float32)
    sum_b = tl.zeros((WIDE,), tl.float32)
    sum_first = tl.zeros((WIDE,), tl.float32)
    sum_rest = tl.zeros((SIDE, WIDE), tl.float32)
    sum_sigma = tl.zeros((M,), tl.float32)
    sum_colours = tl.zeros((SIDE,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(samples, M), tl.num_programs(0)):
        batch, live, rows = rows_of(block, samples, M)
        features = _features(points, planes, offsets, batch, live, rows, sizes, scale, AXES, OFFSETS, C, SIDE, M)
        units = _hidden_layer(features, hidden_weight, hidden_bias, gains, C, SIDE, H, WIDE, PRECISION)
        mask = live[:, None] & (c < C)[None, :]
        colours = tl.load(grad_logits + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
        sigma = tl.load(grad_density + rows, mask=live, other=0.0)
        hidden = softplus(units).to(features.dtype)
        sum_first += tl.sum(sigma[:, None] * hidden.to(tl.float32), axis=0)
        sum_rest += tl.dot(tl.trans(colours), hidden, input_precision=PRECISION)
        sum_sigma += sigma
        sum_colours += tl.sum(colours.to(tl.float32), axis=0)
        units = _units_backward(units, sigma, colours, last_weight, gain, C, SIDE, H, WIDE, PRECISION)
        sum_b += tl.sum(units, axis=0)
        sum_w += tl.dot(tl.trans(units).to(features.dtype), features, input_precision=PRECISION)
    _store_sums(sums, sum_w, sum_rest, sum_b, sum_first, sum_colours, sum_sigma, SIDE, WIDE)


@triton.jit
def inputs_backward(
    points,
    planes,
    offsets,
    grad_features,
    grad_points,
    grad_planes,
    grad_offsets,
    samples,
    height,
    width,
    offset_height,
    offset_width,
    scale,
    AXES: tl.constexpr,
    OFFSETS: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    M: tl.constexpr,
    COPIES: tl.constexpr,
    NEED_POINTS: tl.constexpr,
    NEED_PLANES: tl.constexpr,
    NEED_OFFSETS: tl.constexpr,
):
    """From the gradient of the planes' sum [B, M, C] to those of planes, offset planes and points."""
    batch, live, rows = rows_of(tl.program_id(0), samples, M)
    c = tl.arange(0, SIDE)
    planes += batch * height * width * 3 * C
    grad_planes += batch * height * width * 3 * C
    offsets += batch * offset_height * offset_width * 12
    copy = (tl.program_id(0) % COPIES).to(tl.int64)
    grad_offsets += (copy * tl.num_programs(1) + batch) * offset_height * offset_width * 12
    px, py, pz = load_points(points, rows, live, scale)
    x, y, z = _displaced(offsets, px, py, pz, live, offset_height, offset_width, scale, AXES, OFFSETS, M)
    mask = live[:, None] & (c < C)[None, :]
    gradient = tl.load(grad_features + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
    MOVES: tl.constexpr = NEED_OFFSETS or NEED_POINTS
    gx, gy, gz = look_up_backward(
        gradient, planes, grad_planes, x, y, z, live, height, width, AXES, C, SIDE, M, NEED_PLANES, MOVES
    )
    if OFFSETS and MOVES:
        d = tl.arange(0, 4)[None, :]
        moved = tl.where(d == 0, gx[:, None], tl.where(d == 1, gy[:, None], gz[:, None])) * scale
        moved = tl.where(d == 3, 0.0, moved)
        h, w = offset_height, offset_width
        ox, oy, oz = look_up_backward(
            moved, offsets, grad_offsets, px, py, pz, live, h, w, AXES, 4, 4, M, NEED_OFFSETS, NEED_POINTS
        )
        gx += ox
        gy += oy
        gz += oz
    if NEED_POINTS:
        store_points(grad_points, rows, live, gx * scale, gy * scale, gz * scale)
