"""Finding faces: MediaPipe's face detectors on ever smaller squares, then FaceMesh on a crop around each detection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .graphs import POOL, FaceGraphs

# FaceMesh's vertices on the middle of the forehead and the chin.
_FOREHEAD, _CHIN = 10, 152
# Pixels at which the detectors see a square of the photo; their networks see 128 and 192 of it.
_DETECTION_SIDE = 256
# Side of the square around a detection that FaceMesh sees, in sides of the detected box and in pixels.
_MESH_MARGIN = 2.2
_MESH_SIDE = 512
# Heads that lean further, in degrees, are turned upright and looked at again: FaceMesh is best at upright ones.
_LARGEST_ROLL = 20.0
# The short-range detector's score of the square that FaceMesh saw; faces of the data score 0.84 and more.
_LOWEST_SCORE = 0.75
# The smallest squares' side: a face of 48 pixels is a thirteenth of one, which the full-range detector still sees.
_SMALLEST_SQUARE = 640
# Levels of 255 between the darkest and the brightest value of a square, below which it is not looked at.
_LOWEST_CONTRAST = 8


class NoFaceError(ValueError):
    """No face was found in a photo."""


class FaceTooSmallError(ValueError):
    """The largest face of a photo has too few pixels."""


@dataclass(frozen=True)
class DetectedFace:
    """A face's 468 landmarks [468, 3] float64 in photo pixels: x, y from the photo's top left corner (pixel centres
    lie at halves), z in pixels relative to the head, smaller being nearer to the camera. Order: FaceMesh's."""

    landmarks: np.ndarray

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the landmarks, photo pixels."""
        low, high = self.landmarks[:, :2].min(0), self.landmarks[:, :2].max(0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    @property
    def size(self) -> float:
        """The longer side of the box, pixels."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)

    @property
    def centre(self) -> np.ndarray:
        """The middle of the box [2], photo pixels."""
        left, top, right, bottom = self.box
        return np.array([(left + right) / 2, (top + bottom) / 2])

    @property
    def roll(self) -> float:
        """Degrees by which the head leans to the picture's right, from forehead and chin."""
        right, down, _ = self.landmarks[_CHIN] - self.landmarks[_FOREHEAD]
        return float(np.degrees(np.arctan2(-right, down)))

    def is_at(self, point: np.ndarray) -> bool:
        """Whether a position [2] lies well within the face."""
        return bool(np.linalg.norm(self.centre - point) < 0.45 * self.size)


def sample_square(image: Image.Image, to_image: np.ndarray, size: int, reflect: bool = True) -> Image.Image:
    """Samples a rotated square out of an image, antialiased.

    Args:
        image: RGB.
        to_image: [2, 3], takes a position in the result (0 to `size`, pixel centres at halves) to one in `image`;
            a rotation with uniform scale.
        size: side of the result, pixels.
        reflect: whether the image goes on beyond its borders as its reflection, or black.

    Raises:
        ValueError: the square lies wholly outside the image.
    """
    corners = np.array([[0, 0], [size, 0], [0, size], [size, size]]) @ to_image[:, :2].T + to_image[:, 2]
    step = float(np.hypot(*to_image[:, 0]))
    margin = 3 + int(np.ceil(2 * step))
    left, top = np.floor(corners.min(0)).astype(int) - margin
    right, bottom = np.ceil(corners.max(0)).astype(int) + margin
    width, height = image.size
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise ValueError(f"the square lies outside the image: {corners.tolist()} in {width} x {height} pixels")
    # Where there are many photo pixels to a result pixel: average whole blocks down to two to four of them, sample
    # these as finely as they lie, and leave the rest to Pillow's filter.
    block = max(1, int(step / 2))
    if reflect and (left < 0 or top < 0 or right > width or bottom > height):
        rows, columns = _reflected(np.arange(top, bottom), height), _reflected(np.arange(left, right), width)
        region = Image.fromarray(np.asarray(image)[rows[:, None], columns]).reduce(block)
    else:
        # The transform below paints black what lies outside.
        left, top = max(left, 0), max(top, 0)
        region = image.reduce(block, box=(left, top, min(right, width), min(bottom, height)))
    factor = max(1, int(np.ceil(step / block)))
    linear = to_image[:, :2] / (block * factor)
    offset = (to_image[:, 2] - (left, top)) / block
    coefficients = (*linear[0], offset[0], *linear[1], offset[1])
    fine = (size * factor, size * factor)
    result = region.transform(fine, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return result if factor == 1 else result.resize((size, size), Image.Resampling.LANCZOS)


def _reflected(index: np.ndarray, length: int) -> np.ndarray:
    """Indices folded into [0, length), mirrored at the border pixels' centres as often as needed."""
    if length == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * length - 2)
    return np.where(index < length, index, 2 * length - 2 - index)


class FaceDetector:
    """Finds faces of any size in photos, in any thread.

    MediaPipe's detectors look at a picture at 128 or 192 pixels and miss faces that are small in it, or that fill it.
    So the whole picture is searched first, then with room around it, then in overlapping squares of half its side or
    a little more, a quarter and so on, until a face turns up. The smallest squares have sides of 640 pixels: a photo
    without a face takes about 0.1 s a megapixel of a core's time.

    Detectors share their process's graphs; a copied or unpickled one opens what it needs at its first use.
    """

    def __reduce__(self) -> tuple[type[FaceDetector], tuple[()]]:
        return FaceDetector, ()

    def close(self) -> None:
        """Gives up this detector's part in the process's graphs, which are closed behind the last detector. The next
        call of `detect` opens them again."""
        POOL.leave(self)

    def detect(self, image: Image.Image) -> list[DetectedFace]:
        """Faces of an RGB image, the largest first; an empty list where there is none.

        Once a face is found, the next smaller squares are searched too and the search ends: faces far behind the
        largest one are not listed.

        Raises:
            RuntimeError: this process was forked from one that had used MediaPipe.
        """
        POOL.join(self)
        faces: list[DetectedFace] = []
        side = max(image.size)
        halvings = max(0, int(np.ceil(np.log2(side / _SMALLEST_SQUARE))))
        with POOL.lend() as graphs:
            _search(graphs, image, side, faces, both=True)
            if not faces:
                _search(graphs, image, 2 * side, faces, both=True)
            for level in range(1, halvings + 1):
                found_before = bool(faces)
                # Faces that are large in smaller squares were large enough for the full-range detector before.
                _search(graphs, image, side * (_SMALLEST_SQUARE / side) ** (level / halvings), faces, both=level == 1)
                if found_before:
                    break
        return sorted(faces, key=lambda face: face.size, reverse=True)


def _search(graphs: FaceGraphs, image: Image.Image, side: float, faces: list[DetectedFace], both: bool) -> None:
    """Adds to `faces` those that the detectors find in squares of `side` photo pixels, but for known ones.

    Args:
        graphs: lent to this thread.
        image: RGB.
        side: of the squares, photo pixels.
        faces: what is known so far.
        both: whether the short-range detector looks too.
    """
    scale = side / _DETECTION_SIDE
    size = [max(1, round(length / scale)) for length in image.size]
    scaled = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    lefts, tops = (_starts(length) for length in size)
    for corner in [(left, top) for top in tops for left in lefts]:
        # Beyond the picture a crop is black.
        square = scaled.crop((*corner, corner[0] + _DETECTION_SIDE, corner[1] + _DETECTION_SIDE))
        if max(high - low for low, high in square.getextrema()) < _LOWEST_CONTRAST:
            continue
        for box_centre, box_side in _detections(graphs, square, both):
            centre = (np.array(corner) + box_centre) * scale
            reach = box_side * scale / 2
            inside = ((centre > -reach) & (centre < np.array(image.size) + reach)).all()
            if inside and not any(face.is_at(centre) for face in faces):
                face = _landmarks(graphs, image, centre, box_side * scale)
                if face is not None and not any(other.is_at(face.centre) for other in faces):
                    faces.append(face)


def _starts(length: int) -> list[int]:
    """Where squares begin along a side: one in the middle, or several that cover it and overlap by at least half, so
    that a face of half a square's side is whole in one of them."""
    room = length - _DETECTION_SIDE
    if room <= 0:
        return [room // 2]
    count = int(np.ceil(room / (_DETECTION_SIDE / 2))) + 1
    return [round(start) for start in np.linspace(0, room, count)]


def _detections(graphs: FaceGraphs, square: Image.Image, both: bool) -> list[tuple[np.ndarray, float]]:
    """Middle [2] and side in pixels of the boxes that the detectors find in a picture, the surest first."""
    pixels = np.asarray(square)
    found = []
    for graph in (graphs.near, graphs.far) if both else (graphs.far,):
        for detection in graphs.process(graph, pixels):
            box = detection.location_data.relative_bounding_box
            centre = np.array([box.xmin + box.width / 2, box.ymin + box.height / 2]) * square.size
            found.append((detection.score[0], centre, max(box.width * square.width, box.height * square.height)))
    found.sort(key=lambda item: item[0], reverse=True)
    return [(centre, side) for _, centre, side in found if np.isfinite(centre).all() and 0 < side < np.inf]


def _landmarks(graphs: FaceGraphs, image: Image.Image, centre: np.ndarray, side: float) -> DetectedFace | None:
    """The face at a detection, or None where FaceMesh or a second look of the detector sees none there."""
    face = _mesh(graphs, image, centre, side, roll=0.0)
    if face is not None and abs(face.roll) > _LARGEST_ROLL:
        face = _mesh(graphs, image, face.centre, side, face.roll)
    if face is None:
        return None
    score, score_turned = (_score(graphs, image, centre, side, face.roll + turn) for turn in (0.0, 180.0))
    if score_turned > score:
        # FaceMesh lays a face over an upside-down one all the same, with the eyes about where the mouth is.
        face = _mesh(graphs, image, centre, side, face.roll + 180)
    return face if max(score, score_turned) >= _LOWEST_SCORE else None


def _turned_square(centre: np.ndarray, side: float, roll: float, pixels: int) -> np.ndarray:
    """[2, 3], takes positions in a square of `pixels` around a detection to the photo; a head of `roll` is upright."""
    angle = np.radians(roll)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn * (_MESH_MARGIN * side / pixels)
    return np.column_stack([linear, centre - linear @ [pixels / 2, pixels / 2]])


def _mesh(graphs: FaceGraphs, image: Image.Image, centre: np.ndarray, side: float, roll: float) -> DetectedFace | None:
    """FaceMesh's face nearest to a detection, seen in a square turned by `roll`, or None where it sees none there."""
    to_image = _turned_square(centre, side, roll, _MESH_SIDE)
    # Square, since FaceMesh skews leaning heads in oblong pictures, and black around the photo: of the borders tried,
    # reflected ones mislead FaceMesh most by far where they cut a face.
    square = sample_square(image, to_image, _MESH_SIDE, reflect=False)
    nearest = None
    for found in graphs.process(graphs.mesh, np.asarray(square)):
        # The last ten of the refined landmarks are irises.
        points = np.array([(point.x, point.y, point.z) for point in found.landmark[:468]]) * _MESH_SIDE
        if not np.isfinite(points).all():
            continue
        # FaceMesh counts pixel centres as whole numbers.
        positions = (points[:, :2] + 0.5) @ to_image[:, :2].T + to_image[:, 2]
        face = DetectedFace(np.column_stack([positions, points[:, 2] * np.hypot(*to_image[:, 0])]))
        if nearest is None or np.linalg.norm(face.centre - centre) < np.linalg.norm(nearest.centre - centre):
            nearest = face
    return nearest if nearest is not None and nearest.is_at(centre) else None


def _score(graphs: FaceGraphs, image: Image.Image, centre: np.ndarray, side: float, roll: float) -> float:
    """The short-range detector's score of the square that FaceMesh saw, 0 without a detection."""
    to_image = _turned_square(centre, side, roll, _DETECTION_SIDE)
    square = sample_square(image, to_image, _DETECTION_SIDE, reflect=False)
    detections = graphs.process(graphs.near, np.asarray(square))
    return max((detection.score[0] for detection in detections), default=0.0)
