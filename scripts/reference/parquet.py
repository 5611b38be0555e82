"""Writes tests/fixtures/parquet with Hugging Face's own library: `pip install datasets pillow`.

    python scripts/reference/parquet.py tests/fixtures/parquet
"""

import io
import sys

from PIL import Image as Picture
from datasets import ClassLabel, Dataset, Features, Image

FEATURES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "owl"])})


def picture(number):
    out = io.BytesIO()
    Picture.new("RGB", (4, 3), (number * 20, 0, 99)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": f"{number}.png"}


def rows(first, last):
    numbers = range(first, last)
    columns = {"image": [picture(n) for n in numbers], "label": [n % 3 for n in numbers]}
    return Dataset.from_dict(columns, features=FEATURES)


folder = sys.argv[1]
rows(0, 4).to_parquet(f"{folder}/train-00000-of-00002.parquet")
rows(4, 6).to_parquet(f"{folder}/train-00001-of-00002.parquet")
rows(6, 9).to_parquet(f"{folder}/test-00000-of-00001.parquet")
