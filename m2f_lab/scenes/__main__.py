"""Write the sample scenes:  python -m m2f_lab.scenes [ROOT] [--cityscapes N] [--ade20k N] [--seed N]"""

from __future__ import annotations

import argparse

from m2f_lab.scenes.writing import render_sample


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m m2f_lab.scenes", description="Draw the sample scenes.")
    parser.add_argument("root", nargs="?", default="data/scenes", help="folder to write (data/scenes)")
    parser.add_argument("--cityscapes", type=int, default=200, metavar="N", help="streets to train on (200)")
    parser.add_argument("--ade20k", type=int, default=200, metavar="N", help="rooms to train on (200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, path in render_sample(options.root, options.cityscapes, options.ade20k, options.seed).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
