"""Tri-plane volume rendering (EG3D §4: ray sampling, tri-plane look-up, importance sampling, compositing).

Everything works on plain tensors, in float32 where positions and transmittances are concerned. Distances are in world
units: cameras stand 2.7 from the origin and the box's half side is `box_size`/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import triplane_cuda

AXES = {"x": 0, "y": 1, "z": 2}


def camera_rays(cameras: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays through the pixel centres of a `resolution`² picture.

    cameras [B, 25] → origins [B, 3] and unit directions [B, resolution², 3], row by row.
    """
    cam2world = cameras[:, :16].float().reshape(-1, 4, 4)
    intrinsics = cameras[:, 16:25].float().reshape(-1, 3, 3)
    centres = (torch.arange(resolution, device=cameras.device, dtype=torch.float32) + 0.5) / resolution
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    u, v = u.reshape(1, -1), v.reshape(1, -1)
    fx, skew, cx = intrinsics[:, 0, 0, None], intrinsics[:, 0, 1, None], intrinsics[:, 0, 2, None]
    fy, cy = intrinsics[:, 1, 1, None], intrinsics[:, 1, 2, None]
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    directions = torch.stack((x, y, torch.ones_like(x)), dim=-1) @ cam2world[:, :3, :3].transpose(1, 2)
    return cam2world[:, :3, 3], F.normalize(directions, dim=-1)


def project_to_planes(points: torch.Tensor, plane_axes: Sequence[str], box_size: float) -> torch.Tensor:
    """points [B, M, 3] → coordinates in [-1, 1] on each plane [B, planes, M, 2]; axes "zx" means (u, v) = (z, x)."""
    # By name, not by a list of indices: such a list is copied to the GPU, which a CUDA graph cannot hold.
    axis = dict(zip("xyz", (points.float() * (2 / box_size)).unbind(dim=-1), strict=True))
    return torch.stack([torch.stack([axis[a] for a in axes], dim=-1) for axes in plane_axes], dim=1)


def bilinear_gather(planes: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """Bilinear look-up with zero borders written with gathers, so that it can be differentiated any number of times.

    planes [N, C, H, W], uv [N, M, 2] in [-1, 1] (pixel centres, not corners, at the ends) → [N, M, C].
    Equals `grid_sample(align_corners=False)`, whose backward has no derivative on CUDA.
    """
    n, channels, height, width = planes.shape
    table = planes.permute(0, 2, 3, 1).reshape(n, height * width, channels)
    x = ((uv[..., 0] + 1) * width - 1) / 2
    y = ((uv[..., 1] + 1) * height - 1) / 2
    x0, y0 = x.detach().floor(), y.detach().floor()
    fx, fy = x - x0, y - y0
    total = 0
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = x0 + dx, y0 + dy
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        # Whole numbers are clamped: what is no number would point outside, which on a GPU ends the process.
        index = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
        weight = (fx if dx else 1 - fx) * (fy if dy else 1 - fy) * inside
        corner = torch.gather(table, 1, index[..., None].expand(-1, -1, channels))
        total = total + corner * weight[..., None].to(corner.dtype)
    return total


@dataclass(frozen=True)
class PlaneTable:
    """Planes laid out for weighted look-ups on the CPU: one row [C] a pixel, with a border of zeros.

    `rows` is [B·P·(H + 4)·(W + 4), C]: each plane has two pixels of border on all sides. A point held
    there meets zeros alone, and so has no gradient.
    """

    rows: torch.Tensor
    batch: int
    count: int
    height: int
    width: int

    @classmethod
    def of(cls, planes: torch.Tensor) -> PlaneTable:
        """Lays out planes [B, P, C, H, W]."""
        batch, count, channels, height, width = planes.shape
        rows = F.pad(planes.permute(0, 1, 3, 4, 2), (0, 0, 2, 2, 2, 2)).reshape(-1, channels)
        return cls(rows, batch, count, height, width)

    def sample(self, points: torch.Tensor, plane_axes: Sequence[str], box_size: float) -> torch.Tensor:
        """As `sample_planes`: the mean of the planes' bilinear look-ups in one weighted sum of rows.

        Once differentiable in the planes and in the points.
        """
        return _TableLookup.apply(self.rows, points, self, tuple(plane_axes), box_size)

    def cells(
        self, points: torch.Tensor, plane_axes: Sequence[str], box_size: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where points [B, M, 3] lie: the row of the first of four corners on each plane, and the fractions u and v of
        the way to the next ones, each [P, B·M]."""
        coordinates = points.float().flatten(0, 1).t().contiguous()
        along = {}
        for axis, side in {pair for axes in plane_axes for pair in zip(axes, (self.width, self.height))}:
            # In pixels; whatever lies outside meets the border's zeros.
            x = (coordinates[AXES[axis]] * (side / box_size) + (side - 1) / 2).clamp_(-2, side)
            low = x.floor()
            fraction = x - low
            along[axis, side] = low.nan_to_num_().to(torch.int32), fraction  # which stays NaN, and so the result
        columns, u = (torch.stack(t) for t in zip(*(along[axes[0], self.width] for axes in plane_axes)))
        rows, v = (torch.stack(t) for t in zip(*(along[axes[1], self.height] for axes in plane_axes)))
        stride = self.width + 4
        first = torch.arange(self.batch * self.count, dtype=torch.int32, device=points.device)
        first = (first * ((self.height + 4) * stride) + (2 * stride + 2)).view(self.batch, self.count, 1)
        base = rows.mul_(stride).add_(columns)
        base.view(self.count, self.batch, -1).add_(first.transpose(0, 1))
        return base, u, v

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """The four corners of a cell, counted in rows from its first one: along u, along v, along both."""
        return 0, 1, self.width + 4, self.width + 5


def _corner_weights(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Bilinear weights of a cell's corners, in the order of `PlaneTable.corners`."""
    both = u * v
    across, along = v - both, u - both
    return (1 - v) - along, along, across, both


def _corner_slopes(x: torch.Tensor, one: float, along_u: bool) -> tuple[torch.Tensor, ...]:
    """Derivatives of `_corner_weights` along one fraction, given the other one, x; both are scaled so that 1 is
    `one`."""
    rest = one - x
    return (-rest, rest, -x, x) if along_u else (-rest, -x, rest, x)


def _bags(corners: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """What belongs to each of the four corners on P planes, P tensors [N], point by point: [N, 4·P]."""
    return torch.stack([row for rows in zip(*corners, strict=True) for row in rows], dim=-1)


class _TableLookup(torch.autograd.Function):
    """Sums of rows, and on the way back sums of gradients: what each row gets is gathered by sorting the cells.

    That is several times as fast as adding sample after sample, and its order does not depend on threads.
    """

    @staticmethod
    def forward(ctx, rows, points, table, plane_axes, box_size):
        base, u, v = table.cells(points.detach(), plane_axes, box_size)
        ctx.table, ctx.plane_axes, ctx.box_size, ctx.shape = table, plane_axes, box_size, points.shape
        ctx.save_for_backward(rows, base, u, v)
        index, weight = _bags([base + corner for corner in table.corners]), _bags(_corner_weights(u, v))
        sums = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight.mul_(1 / table.count).to(rows.dtype))
        return sums.unflatten(0, points.shape[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        rows, base, u, v = ctx.saved_tensors
        gradient = gradient.flatten(0, 1).contiguous()
        rows_gradient = points_gradient = None
        if ctx.needs_input_grad[0]:
            rows_gradient = _rows_gradient(ctx.table, base, u, v, gradient)
        if ctx.needs_input_grad[1]:
            points_gradient = _points_gradient(ctx, rows, base, u, v, gradient).view(ctx.shape)
        return rows_gradient, points_gradient, None, None, None


def _rows_gradient(table, base, u, v, gradient) -> torch.Tensor:
    """Of each row, the sum of the samples' gradients [N, C] that touched it, by their weights."""
    cells, order = base.flatten().sort()
    u, v = u.flatten()[order], v.flatten()[order]
    samples = order.remainder_(len(gradient)).to(torch.int32)
    number = len(table.rows)
    starts = torch.searchsorted(cells, torch.arange(number, dtype=torch.int32, device=cells.device), out_int32=True)
    total = torch.zeros_like(table.rows)
    for offset, share in zip(table.corners, _corner_weights(u, v)):
        share = share.mul_(1 / table.count).to(gradient.dtype)
        # A bag for each cell: all samples whose first corner it is.
        sums = F.embedding_bag(samples, gradient, starts, mode="sum", per_sample_weights=share)
        total[offset:] += sums[: number - offset]
    return total


def _points_gradient(ctx, rows, base, u, v, gradient) -> torch.Tensor:
    """Of each point, [N, 3]: along each axis the look-up's slope, times the gradient [N, C]."""
    table, result = ctx.table, gradient.new_zeros(len(gradient), 3)
    corners = [base + corner for corner in table.corners]
    for axis, number in AXES.items():
        planes = [plane for plane, axes in enumerate(ctx.plane_axes) if axis in axes]
        if not planes:
            continue
        slopes = []
        for plane in planes:
            along_u = ctx.plane_axes[plane][0] == axis
            scale = (table.width if along_u else table.height) / (ctx.box_size * table.count)
            slopes.append(_corner_slopes((v if along_u else u)[plane] * scale, scale, along_u))
        weight = _bags(list(zip(*slopes, strict=True)))
        index = _bags([[corner[plane] for plane in planes] for corner in corners])
        slope = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight.to(rows.dtype))
        torch.sum(slope.mul_(gradient), dim=1, out=result[:, number])
    return result


def sample_planes(
    planes: torch.Tensor | PlaneTable,
    points: torch.Tensor,
    plane_axes: Sequence[str],
    box_size: float,
    lookup: str = "auto",
) -> torch.Tensor:
    """Mean over the planes of their features at the projected points (EG3D's aggregation; Eq. 3 up to the factor).

    planes [B, P, C, H, W], points [B, M, 3] in world units → [B, M, C]; zero outside of the box.
    `lookup`: "auto" takes the fused CUDA kernel where it can run and `grid_sample` elsewhere; "grid_sample" and
    "gather" force one. Only "gather" can be differentiated twice on CUDA. A `PlaneTable` has its own look-up.
    """
    if isinstance(planes, PlaneTable):
        return planes.sample(points, plane_axes, box_size)
    batch, count, channels, height, width = planes.shape
    if lookup == "auto" and triplane_cuda.is_supported(planes, plane_axes):
        return triplane_cuda.sample_planes(planes, points * (2 / box_size), plane_axes)
    if lookup not in ("auto", "grid_sample", "gather"):
        raise ValueError(f"lookup must be 'auto', 'grid_sample' or 'gather', got {lookup!r}")
    uv = project_to_planes(points, plane_axes, box_size).flatten(0, 1)
    flat = planes.reshape(batch * count, channels, height, width)
    if lookup == "gather":
        features = bilinear_gather(flat, uv)
    else:
        # It takes positions in the planes' precision, and in bfloat16 samples would move by a pixel.
        flat = flat.to(torch.promote_types(flat.dtype, uv.dtype)).contiguous(memory_format=torch.channels_last)
        features = F.grid_sample(flat, uv[:, None].to(flat.dtype), align_corners=False)[:, :, 0]
        features = features.transpose(1, 2).to(planes.dtype)
    return features.reshape(batch, count, -1, channels).mean(dim=1)


def stratified_depths(
    origins: torch.Tensor, rays: int, start: float, end: float, samples: int, jitter: bool
) -> torch.Tensor:
    """Distances [B, rays, samples] along the rays: `samples` even steps from `start` to `end`, each moved by a uniform
    fraction of a step (`jitter`), or by half a step."""
    step = (end - start) / (samples - 1)
    like = {"dtype": torch.float32, "device": origins.device}
    depths = torch.linspace(start, end, samples, **like).expand(origins.shape[0], rays, samples)
    fraction = torch.rand(depths.shape, **like) if jitter else 0.5
    return depths + fraction * step


def compositing_weights(depths: torch.Tensor, densities: torch.Tensor) -> torch.Tensor:
    """Weights of the intervals between neighbouring samples (mip-NeRF's midpoint rule as EG3D uses it).

    depths (ascending) and densities σ before activation, both [B, M, S] → [B, M, S - 1]:
    wᵢ = αᵢ·Π_{j<i}(1 - αⱼ), αᵢ = 1 - exp(-softplus((σᵢ + σᵢ₊₁)/2 - 1)·δᵢ), computed as the loss of transmittance
    Tᵢ - Tᵢ₊₁ over the interval, where Tᵢ = exp(-Σ_{j<i} softplus(·)·δⱼ).
    """
    delta = depths[..., 1:] - depths[..., :-1]
    optical = F.softplus((densities[..., :-1] + densities[..., 1:]) / 2 - 1) * delta
    transmittance = F.pad(torch.exp(-_cumulative_sum(optical)), (1, 0), value=1.0)
    return transmittance[..., :-1] - transmittance[..., 1:]


def _cumulative_sum(x: torch.Tensor) -> torch.Tensor:
    # CUDA scans short innermost axes several times slower than outer ones.
    return torch.cumsum(x.mT.contiguous(), dim=-2).mT if x.is_cuda else torch.cumsum(x, dim=-1)


def random_quantiles(
    depths: torch.Tensor, samples: int, uniform: torch.Tensor | None = None, stratified: bool = False
) -> torch.Tensor:
    """Where in the cumulative distribution of its weights each ray is sampled, [B, M, samples] in [0, 1); arguments as
    those of `importance_depths`."""
    if uniform is None:
        uniform = torch.rand(*depths.shape[:2], samples, dtype=torch.float32, device=depths.device)
    return (uniform + torch.arange(samples, device=uniform.device)) / samples if stratified else uniform


def importance_depths(
    depths: torch.Tensor,
    weights: torch.Tensor,
    samples: int,
    jitter: bool,
    uniform: torch.Tensor | None = None,
    stratified: bool = False,
) -> torch.Tensor:
    """Draw distances from the coarse weights by inverting their cumulative distribution (NeRF §5.2).

    depths [B, M, S], weights [B, M, S - 1] → [B, M, samples]. Without `jitter` the quantiles are evenly spaced; with
    it they are uniform random numbers, as in EG3D, or, `stratified`, one such number in each of as many even strata
    (mip-NeRF), which varies far less from call to call. `uniform` [B, M, samples]: the random numbers, if they are to
    be given. No gradient flows through it.
    """
    with torch.no_grad():
        batch, rays, _ = depths.shape
        # A max filter followed by a mean keeps the neighbours of a surface likely; 0.01 keeps the rest possible.
        smooth = F.max_pool1d(weights.flatten(0, 1)[:, None], 2, stride=1, padding=1)
        smooth = F.avg_pool1d(smooth, 2, stride=1)[:, 0] + 0.01
        bins = ((depths[..., :-1] + depths[..., 1:]) / 2).flatten(0, 1)
        mass = smooth[:, 1:-1] + 1e-5
        last = mass.shape[1]
        cdf = F.pad(_cumulative_sum(mass / mass.sum(dim=-1, keepdim=True)), (1, 0)).contiguous()
        if not jitter:
            u = torch.arange(samples, dtype=torch.float32, device=depths.device)
            u = ((u + 0.5) / samples).expand(batch * rays, -1).contiguous()
        else:
            u = random_quantiles(depths, samples, uniform, stratified).flatten(0, 1).contiguous()
        index = torch.searchsorted(cdf, u, right=True)
        below, above = (index - 1).clamp(min=0), index.clamp(max=last)
        cdf_below, cdf_above = cdf.gather(1, below), cdf.gather(1, above)
        width = cdf_above - cdf_below
        width = torch.where(width < 1e-5, torch.ones_like(width), width)
        low, high = bins.gather(1, below), bins.gather(1, above)
        return (low + (u - cdf_below) / width * (high - low)).reshape(batch, rays, samples)


def merge_and_weigh(depths: torch.Tensor, densities: torch.Tensor, limits: torch.Tensor | None = None):
    """Composite unordered samples.

    depths, densities [B, M, S] → weight of each sample [B, M, S] in the given order (half of each interval it bounds),
    expected distance [B, M] and opacity [B, M]. Weights are sorted back so that colours need not be. `limits` [2]:
    smallest and largest of the picture's depths, where the given rays are a part of it.
    """
    low, high = (depths.min(), depths.max()) if limits is None else limits.unbind()
    depths, order = torch.sort(depths, dim=-1)
    weights = compositing_weights(depths, densities.gather(-1, order))
    opacity = weights.sum(dim=-1)
    distance = (weights * (depths[..., :-1] + depths[..., 1:]) / 2).sum(dim=-1)
    # A ray that meets nothing ends at the farthest sample; dividing by 1 there keeps its gradient finite.
    empty = opacity <= 0
    distance = distance / torch.where(empty, torch.ones_like(opacity), opacity)
    distance = torch.where(empty, high, distance).clamp(low, high)
    share = (F.pad(weights, (1, 0)) + F.pad(weights, (0, 1))) / 2
    return torch.zeros_like(share).scatter(-1, order, share), distance, opacity
