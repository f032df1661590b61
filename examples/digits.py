"""Digits in seconds: the default classifier, and what it looks at.

    python examples/digits.py [--plot PICTURE.png]

Needs the extras sklearn and, for the picture, viz.
"""

import argparse
import time

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dualform as df


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="where to save the picture")
    parser.add_argument("--alpha", type=float, default=None, help="weight decay; chosen on held-out rows if left out")
    args = parser.parse_args()
    X, y = load_digits(return_X_y=True)
    train, test, a, b = train_test_split(X, y, random_state=0)
    start = time.perf_counter()
    alpha = "auto" if args.alpha is None else args.alpha
    model = make_pipeline(StandardScaler(), df.RPNClassifier(alpha=alpha, random_state=0)).fit(train, a)
    seconds = time.perf_counter() - start
    print(
        f"accuracy {model.score(test, b):.3f} on {len(b)} held-out digits, {seconds:.1f} s, alpha {model[-1].alpha_:g}"
    )
    if args.plot:
        model[-1].plot(output=8).savefig(args.plot)


if __name__ == "__main__":
    main()
