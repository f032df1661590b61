"""From numbers to a law: 600 rows of a satellite's energy, its formula, its picture.

    python examples/symbolic_regression.py [--plot PICTURE.png]

Needs the extras sklearn and, for the picture, viz.
"""

import argparse

import numpy as np
import pandas as pd

import dualform as df


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="where to save the picture")
    args = parser.parse_args()
    r = np.random.RandomState(0)
    X = pd.DataFrame(r.uniform(1, 5, (600, 4)), columns=["m", "v", "k", "r"])
    y = X.m * X.v**2 / 2 - X.k / X.r
    parts = [
        ("extended", {"functions": ("identity", "reciprocal")}),
        ("taylor", {"degree": 3, "symmetric": True}),
    ]
    layers = [{"expansion": ("nested", {"functions": parts})}]
    model = df.RPNRegressor(layers, standardize=False).fit(X, y)
    print("the law:  y = 0.5*m*v**2 - k/r")
    print("learnt:  ", model.formula())
    if args.plot:
        model.plot(X, y).savefig(args.plot)


if __name__ == "__main__":
    main()
