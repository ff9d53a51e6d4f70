"""Words of a question file that are short for more: `match: flops`, `control: a_a`, one number for all data seeds.

They become the long form before the question is checked, and the long form stays as it is when it is read once more: the runner writes
that into the sweep's folder.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Sequence
from typing import Any

from longcat_lab.node import ConfigError, nearest

SHORT = ("free",)  # keys of the file alone
QUANTITIES = ("active_params", "total_params", "flops", "wall_clock")  # the four that `match` knows as words
CONTROLS = ("shuffled_tokens", "feature_off", "a_a")
A_A, OFF = "a_a", "_off"
SWITCH = "switch_off"  # `off` alone is no text to YAML
APART = 1_000_003  # from a seed to that of the A/A arm's initial values
SHUFFLED = {"where": "validation text with the order of its tokens destroyed", "metric": "shuffled_bpb"}
# Settings under these keys are one feature, and this takes its influence away while all of it still runs.
NGRAM, MTP = "model.embedding.ngram", "model.mtp"
TABLE_RATE = "training.optimizer.table_lr_multiplier"
EMPTY_TABLES = {f"{NGRAM}.table_init_ratio": 0.0, TABLE_RATE: 0.0}
NGRAM_OFF = {"ngram_embedding": EMPTY_TABLES, "ngram_sum": EMPTY_TABLES, "bigram_lambda": {TABLE_RATE: 0.0}}


def spelled_out(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a question file with every short word as what it stands for.

    What has a wrong type stays as it is: the schema says so.

    Raises:
        ConfigError: a word is unknown, or lacks what it needs.
    """
    data = dict(data)
    _text_keys(data, ())
    if isinstance(data.get("variants"), dict):  # YAML reads a bare `plain:` as null
        data["variants"] = {name: {} if values is None else values for name, values in data["variants"].items()}
    seeds, order = data.get("seeds"), data.get("data_seeds")
    if type(order) is int and isinstance(seeds, list):
        data["data_seeds"] = [order] * len(seeds)
    if isinstance(data.get("control"), str):
        data["control"] = [data["control"]]
    elif "control" in data and data["control"] is None:
        del data["control"]
    _switches(data)
    for i, word in enumerate(data.get("control") or () if isinstance(data.get("control"), list) else ()):
        if word not in CONTROLS:
            hint = nearest(word, list(CONTROLS)) if isinstance(word, str) else f"; known here: {', '.join(CONTROLS)}"
            raise ConfigError(f"'control' knows no {word!r}{hint}", ("control", i))
    if _whole(data):
        _control(data)
        _match(data)
    else:  # what is wrong lies elsewhere, and is to be said first
        data = {key: value for key, value in data.items() if key != "free" and not (key == "match" and isinstance(value, str))}
    return data


def _text_keys(value: Any, at: tuple[Any, ...]) -> None:
    """YAML reads the words no, off and 1 as something else than text, and one half of a pair of UTF-16 as text, which no file can hold."""
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"'{'.'.join(map(str, at))}' holds half a character ({value!r}); write it anew.", at)
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(value, dict) and not isinstance(key, str):
            place = f" in '{'.'.join(map(str, at))}'" if at else ""
            raise ConfigError(f"the key {key!r}{place} is not text to YAML; put it in quotes.", (*at, key))
        _text_keys(key, at)
        _text_keys(inner, (*at, key))


def _whole(data: dict[str, Any]) -> bool:
    """Whether everything is there that arms are made of, and of its type; if not, the schema says why."""
    variants, off, baseline = data.get("variants"), data.get(SWITCH), data.get("baseline")
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        return False
    if not isinstance(data.get("set"), dict | None) or not isinstance(data.get("control"), list | None):
        return False
    if off is not None and not (isinstance(off, dict) and all(isinstance(each, dict | None) for each in off.values())):
        return False
    return isinstance(baseline, str) and baseline in variants


def _switches(data: dict[str, Any]) -> None:
    """A variant's own `switch_off` goes to the question's."""
    variants, known = data.get("variants"), data.get(SWITCH) or {}
    if not isinstance(variants, dict) or not isinstance(known, dict):
        return
    inner = {name: values[SWITCH] for name, values in variants.items() if isinstance(values, dict) and SWITCH in values}
    for name, values in inner.items():
        if not isinstance(values, dict | None):
            said = (
                f"'variants.{name}.{SWITCH}': write the settings that switch it off, as in {{setting: value}}, got {reprlib.repr(values)}."
            )
            raise ConfigError(said, ("variants", name, SWITCH))
    if inner:
        data["variants"] = {k: {n: s for n, s in v.items() if n != SWITCH} if k in inner else v for k, v in variants.items()}
        data[SWITCH] = {**known, **inner}


def _match(data: dict[str, Any]) -> None:
    word, free = data.get("match"), data.pop("free", None)
    if word is None or isinstance(word, list):
        if free is not None:
            raise ConfigError(
                f"'free' goes with one word of 'match' ({', '.join(QUANTITIES)}); a list of rules frees in each rule.", ("free",)
            )
        return
    if not isinstance(word, str) or word not in QUANTITIES:
        hint = nearest(word, list(QUANTITIES)) if isinstance(word, str) else f"; known here: {', '.join(QUANTITIES)}, or a list of rules"
        raise ConfigError(f"'match' knows no {word!r}{hint}", ("match",))
    arms = [name for name in data["variants"] if name != data["baseline"] and name not in controls(data.get("control"), data["variants"])]
    if isinstance(free, str):
        free = dict.fromkeys(arms, free)
    if not isinstance(free, dict | None) or not all(isinstance(each, str) for each in (free or {}).values()):
        raise ConfigError(
            "'free': write one setting for all variants, or a setting for each, as in free: {ngram: training.steps}.", ("free",)
        )
    for name in free or {}:
        if name not in arms:
            what = "the baseline, which stays as it is" if name == data["baseline"] else f"not a variant{nearest(str(name), arms)}"
            raise ConfigError(f"'free' names '{name}', which is {what}{'' if what.endswith('?') else '.'}", ("free", name))
    data["match"] = [{"quantity": word, "reference": data["baseline"], "free": free or {}}]


# ---- controls


def controls(control: Any, variants: Collection[str]) -> dict[str, str]:
    """Variant that is a control -> which one."""
    control = control if isinstance(control, list) else []
    found = {A_A: A_A} if A_A in control and A_A in variants else {}
    if "feature_off" in control:
        found |= {name: "feature_off" for name in variants if name.endswith(OFF) and name.removesuffix(OFF) in variants}
    return found


def other_seed(seed: int, seeds: Sequence[int]) -> int:
    """The seed of the A/A arm's initial values, for the one of its pair: none of the question's own."""
    found = (seed + APART) % 2**31
    while found in seeds:
        found = (found + 1) % 2**31
    return found


def _control(data: dict[str, Any]) -> None:
    """Adds what the controls stand for: the A/A arm, an arm with its feature off for each variant, and where effects vanish."""
    asked, variants, baseline = data.get("control") or [], dict(data["variants"]), data["baseline"]
    if data.get(SWITCH) and "feature_off" not in asked:
        raise ConfigError(f"'{SWITCH}' is for control: feature_off, which the question does not ask for.", (SWITCH,))
    if "shuffled_tokens" in asked:
        if isinstance(data.get("vanishes"), dict) and data["vanishes"].get("metric") != SHUFFLED["metric"]:
            raise ConfigError(
                "control: shuffled_tokens and 'vanishes' name two places where the effect should vanish; keep one.", ("vanishes",)
            )
        data["vanishes"] = data.get("vanishes") or SHUFFLED
    written = bool(data.get("solved"))  # by the runner: the arms are there, with what was solved and tuned
    if A_A in asked and not written:
        if variants.get(A_A, variants[baseline]) != variants[baseline]:
            raise ConfigError(f"'{A_A}' is the name of the arm of control: a_a; give the variant another name.", ("variants", A_A))
        variants[A_A] = dict(variants[baseline])
    if "feature_off" in asked and not written:
        known = data.get(SWITCH) if isinstance(data.get(SWITCH), dict) else {}
        for name in known or {}:
            if name not in data["variants"] or name == baseline:
                others = [v for v in data["variants"] if v != baseline]
                said = f"'{SWITCH}' names '{name}', which is no variant beside the baseline{nearest(str(name), others)}"
                raise ConfigError(said, (SWITCH, name))
        there = controls(["feature_off"], data["variants"])
        for name, overrides in data["variants"].items():
            if name in (baseline, A_A) or name in there or (name in (known or {}) and known[name] is None):
                continue
            arm = {**overrides, **(known.get(name) or _switch(name, overrides, {**(data.get("set") or {}), **overrides}))}
            if variants.setdefault(f"{name}{OFF}", arm) != arm:
                raise ConfigError(
                    f"'{name}{OFF}' is the name of the arm of control: feature_off; give the variant another name.",
                    ("variants", f"{name}{OFF}"),
                )
    data["variants"] = variants


def _switch(name: str, overrides: dict[str, Any], all_set: dict[str, Any]) -> dict[str, Any]:
    """The settings that switch off what a variant adds."""
    found: dict[str, Any] = {}
    odd = None
    for key in overrides:
        if key == NGRAM or key.startswith(f"{NGRAM}.") or (key == TABLE_RATE and any(k.startswith(NGRAM) for k in overrides)):
            whole = all_set.get(NGRAM)
            kind = all_set.get(f"{NGRAM}.kind") or (whole.get("kind") if isinstance(whole, dict) else None) or "ngram_embedding"
            if isinstance(kind, str) and kind in NGRAM_OFF:
                found |= NGRAM_OFF[kind]
                continue
        elif key == MTP or key.startswith(f"{MTP}."):
            found[f"{MTP}.loss_weight"] = 0.0
            continue
        odd = odd or key
    if odd or not found:
        what = f"what {odd} does" if odd else "what it changes"
        raise ConfigError(
            f"control: feature_off knows no switch for {what} in '{name}': name it ({SWITCH}: {{{name}: {{setting: value}}}}), or leave "
            f"the variant out ({SWITCH}: {{{name}: null}}).",
            ("variants", name),
        )
    return found
