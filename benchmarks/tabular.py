"""Estimators of heads beside linear models, scikit-learn's common choices and pykan: data sets, Feynman, KAN's toys.

    python benchmarks/tabular.py [--kan FOLDER] [--statsmodels FOLDER] [--groups ...] [--jobs N] [--seeds N]

writes benchmarks/results/tabular.json and .md. FOLDER holds pykan (`pip install --no-deps --target FOLDER pykan`) or
statsmodels (likewise), of which only the data sets are read: the groups "classes" and "numbers" are made of them. Every
model sees the same rows; nothing is tuned on test rows. Classification: a quarter held out, accuracy. diabetes and the
other numbers: a quarter held out, R2. Formulas: 400 rows to learn, 1000 others to judge, no noise, relative root mean
square error. Times are of the processor (one thread), so other work on the machine does not count.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import harness
import numpy as np
import torch
from sklearn import datasets
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.svm import SVC, SVR

import dualform as df

pi, sin, cos, exp, sqrt = np.pi, np.sin, np.cos, np.exp, np.sqrt

# Number: (formula, ranges). Feynman's lectures, as in Udrescu and Tegmark 2020, table 4; constants are variables there
# too.
FEYNMAN = {
    "I.6.20a": ("exp(-theta**2/2)/sqrt(2*pi)", {"theta": (1, 3)}),
    "I.8.14": ("sqrt((x2-x1)**2+(y2-y1)**2)", {"x1": (1, 5), "x2": (1, 5), "y1": (1, 5), "y2": (1, 5)}),
    "I.12.1": ("mu*Nn", {"mu": (1, 5), "Nn": (1, 5)}),
    "I.12.2": ("q1*q2/(4*pi*eps*r**2)", {"q1": (1, 5), "q2": (1, 5), "eps": (1, 5), "r": (1, 5)}),
    "I.12.11": ("q*(Ef+B*v*sin(theta))", {"q": (1, 5), "Ef": (1, 5), "B": (1, 5), "v": (1, 5), "theta": (1, 5)}),
    "I.13.4": ("m*(v**2+u**2+w**2)/2", {"m": (1, 5), "v": (1, 5), "u": (1, 5), "w": (1, 5)}),
    "I.14.3": ("m*g*z", {"m": (1, 5), "g": (1, 5), "z": (1, 5)}),
    "I.14.4": ("k*x**2/2", {"k": (1, 5), "x": (1, 5)}),
    "I.15.10": ("m0*v/sqrt(1-v**2/c**2)", {"m0": (1, 5), "v": (1, 2), "c": (3, 10)}),
    "I.16.6": ("(u+v)/(1+u*v/c**2)", {"u": (1, 5), "v": (1, 5), "c": (1, 5)}),
    "I.18.12": ("r*F*sin(theta)", {"r": (1, 5), "F": (1, 5), "theta": (0, 5)}),
    "I.24.6": ("m*(w**2+w0**2)*x**2/4", {"m": (1, 3), "w": (1, 3), "w0": (1, 3), "x": (1, 3)}),
    "I.25.13": ("q/C", {"q": (1, 5), "C": (1, 5)}),
    "I.27.6": ("1/(1/d1+n/d2)", {"d1": (1, 5), "d2": (1, 5), "n": (1, 5)}),
    "I.29.4": ("w/c", {"w": (1, 10), "c": (1, 10)}),
    "I.29.16": ("sqrt(x1**2+x2**2-2*x1*x2*cos(t1-t2))", {"x1": (1, 5), "x2": (1, 5), "t1": (1, 5), "t2": (1, 5)}),
    "I.34.27": ("h*w/(2*pi)", {"h": (1, 5), "w": (1, 5)}),
    "I.39.22": ("n*k*T/V", {"n": (1, 5), "k": (1, 5), "T": (1, 5), "V": (1, 5)}),
    "I.40.1": ("n0*exp(-m*g*x/(k*T))", {"n0": (1, 5), "m": (1, 5), "g": (1, 5), "x": (1, 5), "k": (1, 5), "T": (1, 5)}),
    "I.43.31": ("mob*kb*T", {"mob": (1, 5), "kb": (1, 5), "T": (1, 5)}),
    "I.50.26": ("x1*(cos(w*t)+al*cos(w*t)**2)", {"x1": (1, 3), "w": (1, 3), "t": (1, 3), "al": (1, 3)}),
    "II.6.15b": ("3*p*cos(theta)*sin(theta)/(4*pi*eps*r**3)", {"p": (1, 3), "theta": (1, 3), "eps": (1, 3), "r": (1, 3)}),
    "II.8.31": ("eps*Ef**2/2", {"eps": (1, 5), "Ef": (1, 5)}),
    "II.27.18": ("eps*Ef**2", {"eps": (1, 5), "Ef": (1, 5)}),
}  # fmt: skip
# Liu et al. 2024 (KAN), section 3.1; the one of 100 variables is left out.
TOYS = {
    "exp(sin(pi x)+y^2)": ("exp(sin(pi*x)+y**2)", {"x": (-1, 1), "y": (-1, 1)}),
    "x y": ("x*y", {"x": (-1, 1), "y": (-1, 1)}),
    "sin(20 x)": ("sin(20*x)", {"x": (-1, 1)}),
    "four, three layers deep": ("exp((sin(pi*(a**2+b**2))+sin(pi*(c**2+d**2)))/2)", dict.fromkeys("abcd", (-1, 1))),
}


def unique(degree):
    return ("taylor", {"degree": degree, "symmetric": True})


def of(names, degree):
    return [{"expansion": ("nested", {"functions": [("extended", {"functions": names}), unique(degree)]})}]


SYMBOLS = {
    "polynomial": [{"expansion": unique(4)}],
    "quotients": of(["identity", "reciprocal"], 4),
    "waves": of(["identity", "trigonometric"], 3),
}
KAN_LAYERS = [
    {"n": 5, "expansion": ("bspline", {"span": (-2, 2)}), "remainder": ("linear", {"activation": "silu", "inside": True})},
    {"expansion": ("bspline", {"span": (-2, 2)}), "remainder": ("linear", {"activation": "silu", "inside": True})},
]  # fmt: skip


class Symbolic:
    """The vocabulary whose error on a fifth of the rows is least; its formula is what is learnt."""

    def __init__(self, seed):
        self.seed = seed

    def fit(self, X, y):
        a, b, c, d = train_test_split(X, y, test_size=0.2, random_state=self.seed)
        found = {}
        for name, layers in SYMBOLS.items():
            model = df.RPNRegressor(layers, standardize=False).fit(a, c)
            found[name] = (np.square(model.predict(b) - d).mean(), model)
        self.model = min(found.values(), key=lambda pair: pair[0])[1]
        return self

    def predict(self, X):
        return self.model.predict(X)


class Kan:
    """pykan with its own optimiser, one hidden layer of five, grid 5: on standardised rows, as the others."""

    def __init__(self, classes, seed, steps=20):
        self.classes, self.seed, self.steps = classes, seed, steps

    def fit(self, X, y):
        from kan import KAN

        self.scale = StandardScaler().fit(X)
        X = torch.tensor(self.scale.transform(X), dtype=torch.float32)
        self.mean, self.std = (0.0, 1.0) if self.classes else (y.mean(), y.std())
        n = int(y.max()) + 1 if self.classes else 1
        y = torch.tensor(y) if self.classes else torch.tensor((y - self.mean) / self.std, dtype=torch.float32)[:, None]
        data = {"train_input": X, "train_label": y, "test_input": X[:8], "test_label": y[:8]}
        # auto_save writes files; symbolic units are off, they slow every step
        self.model = KAN([X.shape[1], 5, n], grid=5, k=3, seed=self.seed, auto_save=False, symbolic_enabled=False)
        loss = torch.nn.CrossEntropyLoss() if self.classes else None
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            self.model.fit(data, opt="LBFGS", steps=self.steps, loss_fn=loss, log=10**6)
        return self

    def predict(self, X):
        with torch.no_grad():
            out = self.model(torch.tensor(self.scale.transform(X), dtype=torch.float32)).numpy()
        return out.argmax(1) if self.classes else out[:, 0] * self.std + self.mean


def scaled(model):
    return make_pipeline(StandardScaler(), model)


def classifiers(seed):
    poly = make_pipeline(
        StandardScaler(), PolynomialFeatures(2, include_bias=False), LogisticRegression(C=0.1, max_iter=200)
    )
    return {
        "RPN": scaled(df.RPNClassifier(random_state=seed)),
        "RPN taylor": scaled(df.RPNClassifier([{"expansion": unique(2)}], random_state=seed)),
        "linear": scaled(LogisticRegression(C=1e6, max_iter=1000)),
        "ridge": scaled(LogisticRegression(max_iter=1000)),
        "boosting": HistGradientBoostingClassifier(random_state=seed),
        "gradient boosting": GradientBoostingClassifier(random_state=seed),
        "forest": RandomForestClassifier(random_state=seed),
        "SVM": scaled(SVC()),
        "MLP": scaled(MLPClassifier(random_state=seed)),
        "polynomial": poly,
        "pykan": Kan(True, seed),
    }


def regressors(seed):
    poly = make_pipeline(StandardScaler(), PolynomialFeatures(3, include_bias=False), RidgeCV(np.logspace(-6, 6, 25)))
    return {
        "RPN": scaled(df.RPNRegressor(random_state=seed)),
        "RPN KAN": scaled(df.RPNRegressor(KAN_LAYERS, random_state=seed)),
        "RPN symbolic": Symbolic(seed),
        "linear": scaled(LinearRegression()),
        "ridge": scaled(RidgeCV(np.logspace(-3, 4, 30))),
        "boosting": HistGradientBoostingRegressor(random_state=seed),
        "gradient boosting": GradientBoostingRegressor(random_state=seed),
        "forest": RandomForestRegressor(random_state=seed),
        "SVM": scaled(SVR(C=100, epsilon=0.01)),
        "MLP": scaled(MLPRegressor(random_state=seed)),
        "polynomial": poly,
        "pykan": Kan(False, seed),
    }


def num_parameters(model):
    """Numbers that were learnt, where that is easily said."""
    last = model[-1] if hasattr(model, "steps") and not isinstance(model, Kan) else model
    last = last.model if isinstance(last, Symbolic | Kan) else last
    if hasattr(last, "network_"):
        return sum(p.numel() for p in last.network_.parameters())
    if isinstance(last, torch.nn.Module):
        return sum(p.numel() for p in last.parameters() if p.requires_grad)
    if hasattr(last, "coefs_"):
        return sum(w.size for w in [*last.coefs_, *last.intercepts_])
    if hasattr(last, "dual_coef_"):
        return int(last.dual_coef_.size + last.support_vectors_.size)
    return int(last.coef_.size) if hasattr(last, "coef_") else None


def tables(seed):
    """Yield (task, X, test X, y, test y) for the data sets."""
    for name in ("iris", "wine", "breast_cancer", "digits", "diabetes"):
        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        stratify = None if name == "diabetes" else y
        yield name, *train_test_split(X, y, test_size=0.25, random_state=seed, stratify=stratify)


# Of statsmodels' data sets: the target, what is left out (names, other targets, sums of columns), and the column that
# says the class. Of more than 1,500 rows, so many are drawn.
NUMBERS = {
    "ccard": ("AVGEXP", []), "committee": ("BILLS104", ["COMMITTEE"]), "copper": ("WORLDCONSUMPTION", ["TIME"]),
    "engel": ("foodexp", []), "grunfeld": ("invest", ["firm"]), "cancer": ("cancer", []),
    "longley": ("TOTEMP", ["Obs"]),
    "randhie": ("mdvis", []), "scotland": ("YES", ["COUNCILDIST", "COUTAX_FEMALEUNEMP"]),
    "stackloss": ("STACKLOSS", []), "statecrime": ("murder", ["state"]), "strikes": ("duration", []),
    "star98": ("PR50M", ["MATHTOT"]),
}  # fmt: skip
CLASSES = {
    "anes96": ("vote", []),
    "fair": ("affairs", []),
    "modechoice": ("mode", ["individual", "choice"]),
    "spector": ("GRADE", ["OBS"]),
}


def shipped(group, folder, seed):
    """Yield data sets that packages ship: statsmodels', whose files are in a folder, and scikit-learn's linnerud."""
    import pandas as pd

    for name, (target, left_out) in (NUMBERS if group == "numbers" else CLASSES).items():
        path = min(Path(folder, "statsmodels", "datasets", name).glob("*.csv"), key=lambda one: len(one.name))
        rows = pd.read_csv(path, sep=None, engine="python")
        rows = rows.rename(columns=lambda column: column.strip("'")).dropna()
        rows = rows.sample(min(len(rows), 1500), random_state=0)
        y = rows[target].to_numpy(float)
        y = y if group == "numbers" else np.unique(y > 0 if name == "fair" else y, return_inverse=True)[1]
        X = rows.drop(columns=[target, *left_out]).to_numpy(float)
        stratify = y if group == "classes" else None
        yield name, *train_test_split(X, y, test_size=0.25, random_state=seed, stratify=stratify)
    if group == "numbers":
        X, Y = datasets.load_linnerud(return_X_y=True)
        yield "linnerud (waist)", *train_test_split(X, Y[:, 1], test_size=0.25, random_state=seed)


def formulas(known, seed):
    for name, (text, ranges) in known.items():
        r = np.random.RandomState(seed)
        rows = {v: r.uniform(*span, 1400) for v, span in ranges.items()}
        y = eval(text, globals(), rows) + np.zeros(1400)
        X = np.stack(list(rows.values()), 1)
        yield name, X[:400], X[400:], y[:400], y[400:]


def judge(group, y, predicted):
    if group in ("tables", "classes"):
        return float((predicted == y).mean())
    if group in ("diabetes", "numbers"):
        return float(1 - np.square(predicted - y).mean() / y.var())
    return float(np.sqrt(np.square(predicted - y).mean()) / y.std())


def run(task, group, models, X, test, y, want, found):
    for name, model in models.items():
        start = time.process_time()
        fitted = model.fit(X, y)
        seconds = time.process_time() - start
        row = found.setdefault(task, {}).setdefault(name, {"scores": [], "seconds": [], "parameters": None})
        row["scores"].append(judge(group, want, fitted.predict(test)))
        row["seconds"].append(round(seconds, 3))
        row["parameters"] = num_parameters(fitted)
        if isinstance(fitted, Symbolic) and "formula" not in row:
            made = fitted.model.formula(1e-4)
            row["formula"] = str(made) if len(str(made)) < 300 else f"{len(made.lines[-1].terms)} terms"


def one_seed(seed, group, kan, statsmodels):
    """Run one seed of one group; a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if kan:
        sys.path.append(kan)
    found = {}
    if group in ("classes", "numbers"):
        splits = shipped(group, statsmodels, seed)
    else:
        splits = tables(seed) if group == "tables" else formulas(FEYNMAN if group == "Feynman" else TOYS, seed)
    for task, *split in splits:
        kind = "diabetes" if task == "diabetes" else group
        models = classifiers(seed) if kind in ("tables", "classes") else regressors(seed)
        if not kan:
            del models["pykan"]
        if kind in ("diabetes", "numbers"):
            del models["RPN symbolic"]  # a search for formulas in ten variables is not for 330 rows
        if kind == "Feynman":
            del models["RPN KAN"]
        run(task, kind, models, *split, found.setdefault(kind, {}))
    return found


def add(found, part):
    """Append one seed's scores and times to those found before."""
    for group, tasks in part.items():
        for task, rows in tasks.items():
            for name, row in rows.items():
                before = found.setdefault(group, {}).setdefault(task, {}).setdefault(name, row)
                if before is not row:
                    before["scores"] += row["scores"]
                    before["seconds"] += row["seconds"]


def summed(found):
    """Keep what the tables quote of the seeds' scores and seconds."""

    def few(xs):
        return harness.summary(xs) | {"mean": float(np.mean(xs)), "std": float(np.std(xs))}

    def of_row(row):
        return row | {key: few(row[key]) for key in ("scores", "seconds")}

    def of_rows(x, depth):
        return {name: of_row(y) if depth == 1 else of_rows(y, depth - 1) for name, y in x.items()}

    return of_rows(found, 3)  # group, task, model


def group_table(group, tasks):
    error = "Relative root mean square error on 1000 new rows, median (least to greatest) of {seeds} seeds"
    said = {
        "classes": "Accuracy on the held-out quarter (of statsmodels), mean ± standard deviation over {seeds} seeds",
        "tables": "Accuracy on the held-out quarter, mean ± standard deviation over {seeds} seeds",
        "diabetes": "R2 on the held-out quarter, as above",
    }

    if group == "numbers":  # a quarter of twenty rows is five: the mean would be of the worst
        error = "R2 on the held-out quarter of data sets of few rows, median (least to greatest) of {seeds} seeds"

    def cell(x, best):
        mean = f"{x['mean']:.3f} ± {x['std']:.3f}"
        text = mean if group in said else f"{x['median']:.1e} ({x['min']:.0e} to {x['max']:.0e})"
        if group == "numbers":
            text = f"{x['median']:.2f} ({x['min']:.2f} to {x['max']:.2f})"
        return f"**{text}**" if best else text

    first = next(iter(tasks.values()))
    names, rows = list(first), []
    for task, found in tasks.items():
        scores = {name: row["scores"] for name, row in found.items()}
        least_is_best = group not in (*said, "numbers")
        value = {
            name: x["mean"] if group in said else x["median"] * (-1) ** least_is_best for name, x in scores.items()
        }
        rows.append([task, *(cell(scores[n], value[n] == max(value.values())) for n in names)])
    seconds = [np.mean([found[n]["seconds"]["mean"] for found in tasks.values()]) for n in names]
    rows.append(["*processor seconds to fit, mean*", *(f"{s:.2f}" for s in seconds)])
    counts = [[found[n]["parameters"] for found in tasks.values()] for n in names]
    rows.append(["*parameters*", *("-" if None in c else f"{min(c):,} to {max(c):,}" for c in counts)])
    return harness.table([said.get(group, error).format(seeds=first["RPN"]["scores"]["n"]), *names], rows)


def report(results):
    parts = [group_table(*pair) for pair in results["found"].items()]
    feynman = results["found"].get("Feynman", {})
    if feynman:
        shown = {name: (FEYNMAN[name][0], rows["RPN symbolic"]["formula"]) for name, rows in feynman.items()}
        rows = [[name, f"`{truth}`", f"`{printed}`"] for name, (truth, printed) in shown.items()]
        parts.append(harness.table(["formula", "truth", "what `formula()` printed (first seed)"], rows))
    return "\n".join(parts)


def measure(options):
    """Measure some groups; those that this run does not measure stay as they were."""
    found = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        cases = [
            (seed, group, options.kan, options.statsmodels)
            for seed in range(options.seeds)
            for group in options.groups
            if options.statsmodels or group not in ("classes", "numbers")
        ]
        for (seed, group, *_), part in zip(cases, pool.map(one_seed, *zip(*cases, strict=True)), strict=True):
            add(found, part)
            print(f"seed {seed}: {group}", flush=True)
    before = json.loads(options.output.read_text())["found"] if options.output.exists() else {}
    return {"found": before | summed(found)}


if __name__ == "__main__":
    # kan: a folder with pykan in it; jobs: processes at a time, a thread each
    groups = ["tables", "classes", "numbers", "Feynman", "KAN's toys"]
    asked = harness.options(__doc__, kan=str, statsmodels=str, groups=groups, jobs=1, seeds=5)
    harness.main(measure, report, asked, "scikit-learn")
