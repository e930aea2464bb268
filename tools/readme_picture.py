"""Draw docs/quickstart.png, the README's picture, from the model that `make quickstart` has trained."""

from pathlib import Path

import numpy as np
import torch

from m2f_lab.data import open_dataset
from m2f_lab.explore import plots
from m2f_lab.training.run import Run

ROOT = Path(__file__).resolve().parent.parent
SCENES = (5, 9)


def main() -> None:
    torch.set_num_threads(1)
    model = Run(ROOT / "runs" / "00_quickstart").model()
    validation = open_dataset("cityscapes", ROOT / "data" / "scenes" / "quickstart", "val")
    samples = [validation[index] for index in SCENES]
    rows = [(s.image, s.label_map, np.asarray(model.predict(s.image).label_map)) for s in samples]
    picture = ROOT / "docs" / "quickstart.png"
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(plots.comparison_rows(rows, validation.classes, width=3.6)._repr_png_())
    print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
