"""Reading config.json: typed keys, and none of them overlooked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from longcat_lab.errors import LabError

REQUIRED: Any = object()

# Keys that say nothing about what the model computes, or only what other keys say too.
BOOKKEEPING = {
    *("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "output_hidden_states", "output_attentions"),
    *("output_router_logits", "id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward"),
    *("_attn_implementation", "attn_implementation", "_experts_implementation", "ep_size", "pretraining_tp", "seq_aux"),
    *("aux_loss_alpha", "router_aux_loss_coef", "moe_impl", "moe_switch_token_num", "use_mla", "mtp_disable_over_tokenizer"),
}
# Keys with the one value that this library's model can express; null, and leaving them out, mean that value.
FIXED: dict[str, Any] = {
    "router_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_dropout": 0,
    "rope_interleave": True,
    "partial_rotary_factor": 1,
    "moe_layer_freq": 1,
    "nextn_use_scmoe": False,
    "ngram_exclude_sp_token": False,
    "ngram_fix_normalize_factor": False,
    "quantization_config": None,
    "compression_config": None,
    "sliding_window": None,
    "special_token_scope": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
WHY = {
    "quantization_config": "only weights in floating point can be read: convert the checkpoint to bfloat16",
    "mtp_disable_over_tokenizer": "prediction steps carry n-gram tables of their own but never read them",
}


class Keys:
    """The keys of one config.json: `get` takes one by type, `finish` speaks of those that nobody took.

    Args:
        data: the parsed file.
        path: the file, for messages.
    """

    def __init__(self, data: dict[str, Any], path: Path) -> None:
        self.data, self.path = data, path
        self._taken: set[str] = set()

    def error(self, what: str) -> LabError:
        return LabError(f"{self.path}: {what}")

    def get(self, kind: type, *names: str, default: Any = REQUIRED) -> Any:
        """The first of `names` that is there and not null, as a `kind` (whole numbers are floats too).

        Raises:
            LabError: none is there and there is no default, or the value is of another type, or two names disagree.
        """
        self._taken.update(names)
        found = [name for name in names if self.data.get(name) is not None]
        if not found:
            if default is REQUIRED:
                raise self.error(f"'{names[0]}' is missing.")
            return default
        value = self.data[found[0]]
        for other in found[1:]:
            if self.data[other] != value:
                raise self.error(f"'{found[0]}' is {value!r} and '{other}' is {self.data[other]!r}, which mean the same: make them equal.")
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys and values", list: "a list"}
            raise self.error(f"'{found[0]}' is {value!r}, but must be {words[kind]}.")
        return value

    def equal(self, name: str, *allowed: Any) -> None:
        """Raises LabError where `name` is there, not null, and none of `allowed`."""
        self._taken.add(name)
        value = self.data.get(name)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(each) for each in allowed)
            raise self.error(f"'{name}' is {value!r}, but only {wanted} fits the other keys.")

    def fixed(self, name: str, value: Any) -> None:
        """Raises LabError where `name` asks for what this library's model cannot express."""
        self._taken.add(name)
        found = self.data.get(name)
        if found is None or found == value or (not found and not value):
            return
        wanted = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
        short = repr(found) if not isinstance(found, dict | list) else "given"
        why = WHY.get(name, f"this library's models can only have {wanted}")
        raise self.error(f"'{name}' is {short}, which cannot be expressed: {why}.")

    def finish(self) -> None:
        """Checks the keys of fixed value; warns of those that are not known at all, with a value that is not empty."""
        for name, value in FIXED.items():
            self.fixed(name, value)
        unknown = sorted(
            k for k, v in self.data.items() if k not in self._taken and k not in BOOKKEEPING and v not in (None, False, [], {})
        )
        if unknown:
            warnings.warn(
                f"{self.path}: keys not known here were left out: {', '.join(unknown)}; the model may differ from what was meant.",
                stacklevel=4,
            )
