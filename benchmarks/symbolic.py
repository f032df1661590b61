"""Symbolic regression: 100 formulas of AI Feynman and its 20 bonus ones, exact recovery, without noise and with 1 %.

    python benchmarks/symbolic.py [--seconds N] [--rows N] [--noise 0 0.01] [--only REGEX] [--minutes N]

The list is benchmarks/feynman.csv. One setting for all: y, or one of its plain transforms, is all products of the
variables (and of their reciprocals, sines and cosines) where `df.RPNRegressor` fits these exactly; else a sum of few
products of parts, found by adding the best one at a time and keeping a beam. Where that is not exact, and there is no
noise, all pairs of products are looked at and the best of them extended, products of y among them: y = sum c p + y sum
d q is a quotient. The coefficients are then made the nearest simple numbers. A formula is recovered if found - truth, or found / truth, is one constant, as SRBench defines it
(La Cava 2021): decided in 40 digits at rows drawn anew, after the coefficients were made simple; a near miss does not
count. --minutes stops early, --gplearn FOLDER runs gplearn beside it.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import signal
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context

import harness
import mpmath
import numpy as np
import sympy

import dualform as df

LIST = harness.HERE / "feynman.csv"
MOST_COLUMNS, MOST_TERMS, BEAM = 12_000, 9, 4
PAIRED, TRIPLED = 5_000, 640  # of how many columns all pairs, and all triples, are looked at
SEEDS, MOST_BESIDE = 16, 3  # how many of these are extended, and how far
LARGEST = 1e100  # squares of more are no numbers
EXACT = 1e-9  # of the target's standard deviation: nothing is left to explain
PUBLISHED = {"Operon": 16.6, "GP-GOMEA": 26.8, "AIFeynman": 55.8, "QDSR (of its 117)": 91.6}
WORDS = {name: getattr(sympy, name) for name in ("exp", "sqrt", "sin", "cos", "tanh", "pi", "log", "atan")} | {
    "arcsin": sympy.asin, "arccos": sympy.acos, "ln": sympy.log, "arctan": sympy.atan,
}  # fmt: skip
z = sympy.Symbol("z", real=True)
# name: what y becomes, and the way back
TARGETS = {
    "y": (lambda y: y, z),
    "1/y": (lambda y: 1 / y, 1 / z),
    "y^2": (np.square, sympy.sqrt(z)),
    "1/y^2": (lambda y: 1 / np.square(y), 1 / sympy.sqrt(z)),
    "log y": (np.log, sympy.exp(z)),
    "log(1 + 1/y)": (lambda y: np.log1p(1 / y), 1 / (sympy.exp(z) - 1)),
    "sin y": (np.sin, sympy.asin(z)),
    "cos y": (np.cos, sympy.acos(z)),
    "atanh y": (np.arctanh, sympy.tanh(z)),
    "exp y": (np.exp, sympy.log(z)),
}
# what a product may have of one variable, and how much it costs
PARTS = {
    x: c
    for c, names in {
        1: ["x", "1/x"], 2: ["x**2", "1/x**2", "sin(x)", "cos(x)"], 3: ["x**3", "1/x**3", "sqrt(x)", "1/sqrt(x)"],
        4: ["sin(x)**2", "cos(x)**2", "x**4", "1/x**4", "sin(x/2)", "cos(2*x)"],
    }.items()
    for x in names
}  # fmt: skip


def formulas():
    """Return number -> (formula, ranges)."""
    with LIST.open() as file:
        rows = list(csv.reader(file))[1:]
    return {
        number: (text, {v: (float(a), float(b)) for v, a, b in (part.split() for part in ranges.split("; "))})
        for number, text, ranges in rows
    }


def truth(text, names):
    return sympy.sympify(text, locals=WORDS | {name: sympy.Symbol(name, real=True) for name in names})


def products(names, X):
    """Write products of parts of different variables, the cheap ones first: expressions and their columns."""
    x = sympy.Symbol("x")
    parts = [(sympy.sympify(text, locals={"x": x}), cost) for text, cost in PARTS.items()]
    with np.errstate(all="ignore"):
        values = {
            (i, k): np.broadcast_to(sympy.lambdify(x, f, "numpy")(X[:, i]), len(X))
            for i in range(len(names)) for k, (f, _) in enumerate(parts)
        }  # fmt: skip

    def of_cost(budget, count):
        if count == 0:
            return [()] if budget == 0 else []
        first = [k for k, (_, cost) in enumerate(parts) if cost <= budget - count + 1]
        return [(k, *rest) for k in first for rest in of_cost(budget - parts[k][1], count - 1)]

    found, columns = [()], [np.ones(len(X))]
    for budget in range(1, 12):
        level = []
        for count in range(1, min(budget, len(names)) + 1):
            for chosen in itertools.combinations(range(len(names)), count):
                level += [tuple(zip(chosen, kinds, strict=True)) for kinds in of_cost(budget, count)]
                if len(found) + len(level) > MOST_COLUMNS:
                    break
        for product in level[: MOST_COLUMNS - len(found)]:
            column = np.prod([values[pair] for pair in product], 0)
            if np.isfinite(column).all():
                found.append(product)
                columns.append(column)
        if len(found) >= MOST_COLUMNS - 1:
            break

    def expression(k):
        return sympy.Mul(*(parts[p][0].subs(x, sympy.Symbol(names[i], real=True)) for i, p in found[k]))

    return expression, np.array(columns)


def composed(names, X):
    """Write functions of a product or quotient of two variables, times products of up to two others: the cheap ones."""
    symbols = [sympy.Symbol(name, real=True) for name in names]
    found, columns = [], []
    for a, b in itertools.combinations(symbols, 2):
        rest = [s for s in symbols if s not in (a, b)]
        factors = [sympy.Integer(1), *(f for s in (*rest, a, b) for f in (s, 1 / s))]
        factors += [f * g for s, t in itertools.combinations(rest, 2) for f in (s, 1 / s) for g in (t, 1 / t)]
        for inner in (a * b, a / b, b / a):
            outer = [sympy.sin(inner), sympy.cos(inner), sympy.sin(inner) ** 2, sympy.exp(inner), sympy.exp(-inner)]
            found += [f * g for f in factors for g in outer]
    with np.errstate(all="ignore"):
        columns = [
            np.broadcast_to(sympy.lambdify(symbols, f, "numpy")(*X.T), len(X)) for f in found[: MOST_COLUMNS // 4]
        ]
    good = [np.isfinite(c).all() and np.abs(c).max() < 1e9 for c in columns]
    return [f for f, ok in zip(found, good, strict=False) if ok], np.array(
        [c for c, ok in zip(columns, good, strict=True) if ok]
    )


def logs(names, X):
    """Write logarithms of the variables, their sums and differences, sines and cosines."""
    symbols = [sympy.Symbol(name, real=True) for name in names]
    inner = [*symbols, *(sympy.sin(s) for s in symbols), *(sympy.cos(s) for s in symbols)]
    inner += [a + b for a, b in itertools.combinations(symbols, 2)] + [
        a - b for a, b in itertools.combinations(symbols, 2)
    ]
    inner += [1 + s for s in symbols] + [1 - s for s in symbols]
    with np.errstate(all="ignore"):
        columns = np.array([np.log(np.abs(sympy.lambdify(symbols, f, "numpy")(*X.T))) for f in inner])
    good = np.isfinite(columns).all(1)
    return [sympy.log(sympy.Abs(f)) for f, ok in zip(inner, good, strict=True) if ok], columns[good]


def unit_rows(columns):
    norms = np.sqrt(np.square(columns).sum(1))
    return columns / np.where(norms > 0, norms, 1)[:, None]


def best_pairs(columns, t):
    """Find the pairs of columns that leave least of t, all looked at by their products."""
    unit = unit_rows(columns).astype(np.float32)
    along, found = unit @ np.float32(t), []
    for i in range(0, len(unit), 500):
        cosine = unit[i : i + 500] @ unit.T
        first, open_ = along[i : i + 500, None], 1 - cosine * cosine
        gain = (first * first + along * along - 2 * first * along * cosine) / np.maximum(open_, 1e-4)
        gain[open_ < 1e-4] = 0
        best = np.argpartition(gain, -2 * SEEDS, None)[-2 * SEEDS :]
        found += {(float(gain.flat[k]), *sorted((i + int(k) // len(unit), int(k) % len(unit)))) for k in best}
    return [pair for _, *pair in sorted(set(found), reverse=True)[:SEEDS]]


def best_triples(columns, t):
    """Find the triples of columns that leave least of t: all pairs beside each, by products of what each leaves."""
    unit, found = unit_rows(columns), {}
    cosines, along = unit @ unit.T, unit @ t
    for i in range(len(unit) - 2):
        rest, first = slice(i + 1, None), cosines[i, i + 1 :]
        inner = cosines[rest, rest] - np.outer(first, first)
        size, b = inner.diagonal(), along[rest] - first * along[i]
        scaled = b * inner
        open_ = np.outer(size, size) - inner * inner
        gain = np.outer(b * b, size)
        gain += gain.T - 2 * scaled * b[:, None]
        gain[open_ < 1e-9] = 0
        gain /= np.maximum(open_, 1e-9)
        for k in np.argpartition(gain, -8, None)[-8:] if gain.size > 8 else range(gain.size):
            j, l = sorted((i + 1 + int(k) // len(b), i + 1 + int(k) % len(b)))
            if j < l:
                found[i, j, l] = gain.flat[k] + along[i] ** 2
    return sorted(found, key=found.get, reverse=True)[:SEEDS]


def chosen(columns, t, beam, width=BEAM, most=MOST_TERMS + 1):
    """Yield (indices, coefficients, residual) of more and more columns: those that lower the residual most."""
    unit = unit_rows(columns)
    beam = [tuple(start) for start in beam]
    for _ in range(most):
        scored, best = {}, None
        for indices in beam:
            Q, r = np.zeros((len(t), 0)), t
            if indices:
                Q = np.linalg.qr(unit[list(indices)].T)[0]
                r = t - Q @ (Q.T @ t)
                left = float(np.sqrt(np.square(r).mean()))
                best = min(best or (left, indices), (left, indices))
            open_ = np.clip(1 - np.square(unit @ Q).sum(1), 0, None)
            gain = np.where(open_ > 1e-9, np.square(unit @ r) / np.maximum(open_, 1e-9), 0)
            for k in np.argpartition(gain, -BEAM)[-BEAM:]:
                scored[tuple(sorted((*indices, int(k))))] = np.square(r).sum() - gain[k]
        if best is not None:
            left, indices = best
            yield indices, np.linalg.lstsq(columns[list(indices)].T, t, rcond=None)[0], left
        beam = sorted(scored, key=scored.get)[:width]


def simple(c, near):
    """Return the simplest p/q pi^k within a relative distance, or the number itself."""
    found = []
    for power in (0, -1, 1, -2, 2):
        ratio = Fraction(float(c / np.pi**power)).limit_denominator(96)
        if ratio and abs(float(ratio) * np.pi**power / c - 1) <= near:
            cost = abs(ratio.numerator) + ratio.denominator + 3 * abs(power)
            found.append((cost, abs(power), sympy.Rational(ratio.numerator, ratio.denominator) * sympy.pi**power))
    return min(found)[2] if found else sympy.Float(float(c))


def written(back, c, named, indices, sizes, near, sign):
    """Put simple coefficients before the columns, leave out those that do nothing, and undo the target's transform."""
    terms = [
        simple(a, near) * named(k) for a, k, size in zip(c, indices, sizes, strict=True) if abs(a) * size > near / 100
    ]
    return sign * back.subs(z, sympy.Add(*terms))


def unique(degree):
    return ("taylor", {"degree": degree, "symmetric": True})


def by_estimator(symbols, X, runs, half, until):
    """Yield what `df.RPNRegressor` finds exactly: all products of the variables, or of them and their reciprocals."""
    both = ("extended", {"functions": ["identity", "reciprocal"]})
    waves = ("extended", {"functions": ["identity", "trigonometric"]})
    specs = [unique(2), unique(3), ("nested", {"functions": [both, unique(2)]}), unique(4), unique(5)]
    specs += [("nested", {"functions": [waves, unique(2)]}), ("nested", {"functions": [both, unique(3)]})]
    for spec, run in itertools.product(specs, runs):
        t = run[2]
        too_wide = df.expansions.build(spec).dim(X.shape[1]) > half // 2
        if too_wide or time.process_time() > until or np.abs(t).max() > LARGEST:
            continue
        model = df.RPNRegressor([{"expansion": spec}], standardize=False).fit(X[:half], t[:half])
        error = model.predict(X[half:]) - t[half:]
        if np.abs(error).max() <= 1e-7 * t.std():
            (line,) = model.formula(1e-6).lines
            own = dict(zip(map(sympy.Symbol, model.formula().inputs), symbols, strict=True))
            parts = [1, *(f.xreplace(own) for _, f in line.terms)]
            yield run, parts, np.array([line.constant, *(c for c, _ in line.terms)])


def by_pairs(names, X, runs, half, until):
    """Yield what is exact of all pairs of columns and their extensions: of functions of products, and of quotients."""
    functions, values = composed(names, X)
    runs = [run for run in runs if np.abs(run[2]).max() < LARGEST]
    for kind, (_, every, t, back, named, turn) in itertools.product(
        ("pairs", "triples", "pairs of a quotient", "triples of a quotient"), runs
    ):
        count, most = min(len(every), PAIRED * 3 // 4), TRIPLED if "triples" in kind else PAIRED
        columns = np.concatenate([every[:count], values[: PAIRED // 4]]) if len(values) else every[:count]
        lead = min(most // 2 if "quotient" in kind else most, len(columns))
        beside = range(1, min(count, most // 2)) if "quotient" in kind else range(0)  # not the one: t = t says nothing
        all_ = np.concatenate([columns[:lead], every[list(beside)] * t])
        fitted = all_[:, :half]
        if time.process_time() > until:
            return
        seeds = (best_triples if "triples" in kind else best_pairs)(fitted, t[:half])
        for indices, c, left in chosen(fitted, t[:half], seeds, SEEDS // 2, MOST_BESIDE):
            if time.process_time() > until:
                return
            if left > EXACT * t.std():
                continue
            terms, sizes = [], np.abs(all_[list(indices)]).max(1) * np.abs(c) / np.abs(t).max()
            for part in (False, True):  # what stands alone, and what stands with t
                told = zip(indices, c, sizes, strict=True)
                own = [(k, a) for k, a, size in told if (k >= lead) == part and size > 1e-8]
                at = [beside[k - lead] if part else k for k, _ in own]
                each = [functions[k - count] if k >= count and not part else named(k) for k in at]
                terms.append(sympy.Add(*(simple(a, 1e-6) * f for (_, a), f in zip(own, each, strict=True))))
            if terms[0] != 0:
                yield turn * back.subs(z, terms[0] / (1 - terms[1]))


def search(names, X, y, noise, seconds):
    """Find an expression: one term more at a time, of every target, until one is exact; else the least held-out error.

    Of those within a twentieth of the least error the shortest is taken.
    """
    until, half = time.process_time() + seconds, len(X) * 3 // 4
    expression, columns = products(names, X)
    log_names, log_columns = logs(names, X)
    near, results, runs = 0.02 if noise else 1e-6, [], []
    sign = 1 if y.mean() > 0 else -1
    symbols = [sympy.Symbol(n, real=True) for n in names]

    def in_logs(k):
        return log_names[k] if k < len(log_names) else expression(k - len(log_names))

    for name, (forward, back) in TARGETS.items():
        with np.errstate(all="ignore"):
            t = forward(np.abs(y) if name == "log y" else y)
        if not np.isfinite(t).all() or t.std() <= 1e-12 * np.abs(t).max():
            continue
        is_log = name == "log y"
        every = np.concatenate([log_columns, columns]) if is_log else columns
        start = (*range(len(names)), len(log_names)) if is_log else ()
        turn = sign if name in ("y^2", "1/y^2", "log y") else 1
        named = in_logs if is_log else expression
        runs.append((chosen(every[:, :half], t[:half], [start]), every, t, back, named, turn))
    everything = list(runs)

    def judged(made):
        try:
            with np.errstate(all="ignore"):
                values = np.broadcast_to(sympy.lambdify(symbols, made, "numpy")(*X[half:].T), len(X) - half)
                error = float(np.sqrt(np.square(values - y[half:]).mean()) / y.std())
        except (TypeError, ValueError, KeyError, ZeroDivisionError):  # infinite, or no numbers
            return np.inf
        if np.isfinite(error):
            results.append((error, int(sympy.count_ops(made)), made))
        return error if np.isfinite(error) else np.inf

    for round_ in itertools.count():
        if round_ == 2:  # one and two terms more than the start are quick to try
            for (_, _, _, back, _, turn), found, c in by_estimator(symbols, X, runs, half, until):
                return written(back, c, found.__getitem__, range(len(c)), np.full(len(c), np.inf), near, turn)
        if not runs or time.process_time() > until:
            break
        for run in list(runs):
            steps, every, t, back, named, turn = run
            if (step := next(steps, None)) is None:
                runs.remove(run)
                continue
            indices, c, left = step
            sizes = np.abs(every[list(indices)]).max(1) / np.abs(t).max()
            made = written(back, c, named, indices, sizes, near, turn)
            if judged(made) < 1e-6 and left < EXACT * t.std():
                return made
            if time.process_time() > until:
                break
    for made in [] if noise else by_pairs(names, X, everything, half, until):
        if judged(made) < 1e-6:
            return made
    least = min((error for error, *_ in results), default=0.0)
    best = [row for row in results if row[0] <= 1.05 * least]
    return min(best, key=lambda row: row[1])[2] if best else sympy.Integer(0)


def is_recovered(found, text, ranges):
    """Is found - truth, or found / truth, one constant?"""
    names, r = list(ranges), np.random.RandomState(99)
    want = truth(text, names)
    symbols = [sympy.Symbol(n, real=True) for n in names]
    with mpmath.workdps(40):
        f, g = (sympy.lambdify(symbols, e, "mpmath") for e in (found, want))
        rows = [[mpmath.mpf(r.uniform(*span)) for span in ranges.values()] for _ in range(8)]
        try:
            pairs = [(mpmath.mpmathify(f(*row)), mpmath.mpmathify(g(*row))) for row in rows]
            differences, ratios = [a - b for a, b in pairs], [a / b for a, b in pairs]
        except (ZeroDivisionError, ValueError, TypeError, OverflowError):
            return False
        close = mpmath.mpf(10) ** -25

        def is_one(xs):
            return max(abs(x - xs[0]) for x in xs) <= close * (1 + max(abs(b) for _, b in pairs))

        return bool(is_one(differences) or (is_one(ratios) and abs(ratios[0]) > close))


def data(number, text, ranges, rows, noise):
    r = np.random.RandomState(sum(map(ord, number)))
    X = np.stack([r.uniform(*span, rows) for span in ranges.values()], 1)
    symbols = [sympy.Symbol(n, real=True) for n in ranges]
    y = np.asarray(sympy.lambdify(symbols, truth(text, ranges), "numpy")(*X.T), float)
    return X, y + noise * np.sqrt(np.square(y).mean()) * r.randn(rows)


def by_gplearn(names, X, y, seconds, folder):
    sys.path.append(folder)
    from gplearn.genetic import SymbolicRegressor

    functions = ("add", "sub", "mul", "div", "sqrt", "log", "sin", "cos")
    model = SymbolicRegressor(population_size=1000, generations=20, function_set=functions, parsimony_coefficient=1e-3,
                              feature_names=names, random_state=0)  # fmt: skip
    model.fit(X, y)
    of_size = {"sqrt": lambda a: sympy.sqrt(sympy.Abs(a)), "log": lambda a: sympy.log(sympy.Abs(a))}
    local = of_size | {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
             "div": lambda a, b: a / b, "sin": sympy.sin, "cos": sympy.cos}  # fmt: skip
    return sympy.sympify(str(model._program), locals=local | {n: sympy.Symbol(n, real=True) for n in names})


def warm():
    """Import, and compile, what the first formula would pay for."""
    df.RPNRegressor([{}]).fit([[0.0], [1.0], [2.0]], [0.0, 1.0, 2.0]).formula()


def one(case):
    number, text, ranges, noise, rows, seconds, gplearn = case
    warnings.simplefilter("ignore")
    X, y = data(number, text, ranges, rows, noise)
    found = {}
    methods = {"ours": lambda: search(list(ranges), X, y, noise, seconds)}
    if gplearn:
        methods["gplearn"] = lambda: by_gplearn(list(ranges), X, y, seconds, gplearn)

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGPROF, late)
    for name, method in methods.items():
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 3 * seconds)
        try:
            made = method()
            row = {"exact": is_recovered(made, text, ranges), "formula": str(made)[:300]}
        except TimeoutError:
            row = {"exact": False, "formula": "out of time"}
        except Exception as error:  # one formula's failure is its own
            row = {"exact": False, "formula": f"failed: {error!r}"[:300]}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        found[name] = row | {"seconds": round(time.process_time() - start, 2)}
    return found


def measure(options):
    """Run the formulas: first those never run, then those not recovered, then the rest that another commit ran.

    The files are written after each, so that a run that is cut off goes on.
    """
    before = json.loads(options.output.read_text()) if options.output.exists() else {}
    found, now = before.get("found", {}), harness.about("sympy", "gplearn")
    commit = now["commit"][:7]

    def rank(case):
        row = found.get(f"noise {case[3]:g}", {}).get(case[0], {})
        new = any(name not in row for name in ("ours", *(["gplearn"] if options.gplearn else [])))
        return (0 if new else 2 if row["ours"]["exact"] else 1, not new and row["ours"].get("commit") == commit)

    known = [(n, *row) for n, row in formulas().items() if re.search(options.only, n)]
    np.random.RandomState(0).shuffle(known)  # so that a run that is cut off is of a fair part
    settings = (options.rows, options.seconds, options.gplearn)
    cases = [(*formula, noise, *settings) for noise in options.noise for formula in known]
    cases = sorted((case for case in cases if not rank(case)[1]), key=rank)
    until = time.monotonic() + 60 * options.minutes
    result = {"found": found, "seconds": options.seconds, "rows": options.rows, "about": before.get("about", "")}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=warm) as pool:
        futures = [pool.submit(one, case) for case in cases]
        for case, future in zip(cases, futures, strict=True):
            if time.monotonic() > until and not future.done():
                pool.shutdown(wait=False, cancel_futures=True)
                break
            row = {name: of | {"commit": commit} for name, of in future.result().items()}
            found.setdefault(f"noise {case[3]:g}", {}).setdefault(case[0], {}).update(row)
            harness.write(options.output, now | result, report)
            print(case[0], case[3], {name: (x["exact"], x["seconds"]) for name, x in row.items()}, flush=True)
    return result


def report(results):
    """Show the shares recovered, beside the published ones, and every formula."""
    known, rows, each = formulas(), [], []
    for noise, tasks in results["found"].items():
        for method in dict.fromkeys(name for row in tasks.values() for name in row):
            for kind, is_of in (("AI Feynman", lambda n: "test" not in n), ("bonus", lambda n: "test" in n)):
                ran = [row[method]["exact"] for n, row in tasks.items() if is_of(n) and method in row]
                if ran:
                    rows.append(
                        [noise, method, kind, f"{sum(ran)} of {len(ran)}", f"{100 * sum(ran) / len(ran):.1f} %"]
                    )
        each += [
            [noise, n, f"`{known[n][0]}`", "yes" if row["ours"]["exact"] else "no", f"`{row['ours']['formula'][:90]}`",
             row["ours"]["seconds"]]
            for n, row in sorted(tasks.items(), key=lambda pair: list(known).index(pair[0])) if "ours" in row
        ]  # fmt: skip
    left = [len(known) - len(tasks) for tasks in results["found"].values()]
    if not any(left):  # shares of a part are not for comparison
        rows += [["noise 0", name, "as published", "", f"{share} %"] for name, share in PUBLISHED.items()]
    part = f" Of {len(known)} formulas {max(left)} were not run." if any(left) else ""
    return (
        harness.table(["noise", "method", "formulas", "recovered", "share"], rows)
        + f"\n{results['rows']} rows, {results['seconds']} processor seconds a formula.{part} {results.get('about', '')}\n\n"
        + harness.table(["noise", "number", "truth", "recovered", "found", "seconds"], each)
    )


if __name__ == "__main__":
    asked = harness.options(
        __doc__, seconds=600.0, rows=300, noise=[0.0, 0.01], only=".", minutes=1e9, jobs=1, gplearn=str
    )
    harness.main(measure, report, asked, "sympy", "gplearn")
