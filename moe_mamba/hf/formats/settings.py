"""A config.json while a format reads it: a key is read, known to say nothing of the function, or refused by name."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, NoReturn, Self

from moe_mamba.errors import UserError, brief

Configuration = Mapping[str, Any]
LARGEST = 2**31 - 1
"""The largest whole number that is believed."""
MOST_REAL = 3e38
"""The largest other number: fp32 has no larger ones."""
MOST_LAYERS = 100_000
"""Layers that are listed before anybody has counted a folder's tensors."""

INERT = frozenset(
    {
        # what the file is
        *("_name_or_path", "architectures", "auto_map", "model_type", "tokenizer_class", "transformers_version"),
        *("unsloth_fixed", "unsloth_version"),
        # how it is run, not what it computes
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward"),
        *("dtype", "output_attentions", "output_hidden_states", "output_router_logits", "output_scores"),
        *("return_dict", "return_dict_in_generate", "torch_dtype", "use_cache"),
        # tokens and lengths, which the tokenizer and the run's own configuration say here
        *("bos_token_id", "decoder_start_token_id", "eos_token_id", "max_position_embeddings", "pad_token_id"),
        *("max_sequence_length", "prefix", "sep_token_id"),
        # where training started, and other tasks
        *("finetuning_task", "id2label", "initializer_range", "label2id", "problem_type", "task_specific_params"),
        # how text is drawn
        *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
        *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *(
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
        ),
        *("num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty", "suppress_tokens"),
        *("temperature", "top_k", "top_p", "typical_p"),
    }
)
"""Keys that Transformers writes for any class, and that change no logit of its causal language models."""

TRAINING_ALONE = frozenset({"attention_dropout", "router_jitter_noise"})
"""Keys that act only in training, and that ours lacks: see ``notes``."""


class Settings:
    """A config.json, or an object in it, that knows which of its keys were read.

    As a context it refuses, at its end, keys that nobody has read: ``with Settings(...) as settings``.

    Args:
        configuration: the file's content.
        architecture: the class that it is of, for messages.
        inert: keys that say nothing about what the model computes.
        place: put before keys in messages.
    """

    def __init__(
        self, configuration: Configuration, architecture: str, inert: Iterable[str] = INERT, place: str = ""
    ) -> None:
        self._configuration = configuration
        self._architecture = architecture
        self._known = set(inert)
        self._place = place
        self._sections: list[Settings] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._refuse_unread()

    def _refuse_unread(self) -> None:
        if self._configuration.get("quantization_config"):
            raise UserError(
                f"config.json has {self._place}quantization_config, but quantised weights are not supported: "
                "give the model that was quantised"
            )
        for key, value in self._configuration.items():
            if key not in self._known and value not in (None, False, 0, "", [], {}):
                raise UserError(
                    f"config.json has the key {self._place}{brief(key)}={_quoted(value)}, which is unknown for "
                    f"{self._architecture}: remove it if the model computes the same without it"
                )
        for section in self._sections:
            section._refuse_unread()

    def given(self, keys: Iterable[str]) -> dict[str, Any]:
        """Those of ``keys`` that are there, as they stand."""
        keys = list(keys)
        self._known.update(keys)
        return {key: self._configuration[key] for key in keys if key in self._configuration}

    def get(self, key: str, default: Any = None) -> Any:
        """A value, where null is as good as none."""
        value = self.given([key]).get(key)
        return default if value is None else value

    def number(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """A whole number from ``least`` to ``most``.

        Raises:
            UserError: it is missing, and has no default, or is something else.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def optional_number(self, key: str, default: int | None = None) -> int | None:
        """A whole number above 0, or None where null is written.

        Args:
            key: of the file.
            default: what its class takes where the key is missing.

        Raises:
            UserError: it is something else.
        """
        return None if self.given([key]).get(key, default) is None else self.number(key, default)

    def real(
        self, key: str, default: float | None = None, least: float | None = None, most: float = MOST_REAL
    ) -> float:
        """A number above 0, or of ``least`` at least, and of ``most`` at most.

        Raises:
            UserError: it is missing, and has no default, or is something else.
        """
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= most
        if not is_number or not (value > 0 if least is None else value >= least):
            belongs = "a number above 0" if least is None else f"a number of at least {least:g}"
            self._wrong(key, value, belongs + f" and at most {most:g}" * (most < MOST_REAL))
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            UserError: it is something else.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return value

    def section(self, *keys: str, inert: Iterable[str] = ()) -> "Settings":
        """An object inside, whose keys are checked as well; where it is missing, an empty one.

        Args:
            keys: where it is, or parts of it are, which must not contradict each other.
            inert: of its keys.

        Raises:
            UserError: it is something else, or two of them contradict each other.
        """
        whole: dict[str, Any] = {}
        place = ""
        for key in keys:
            value = self.get(key, {})
            if not isinstance(value, dict):
                self._wrong(key, value, "an object")
            for name in whole.keys() & value.keys():
                if whole[name] != value[name]:
                    both = f"{place}.{brief(name)} and {key}.{brief(name)}"
                    raise UserError(f"config.json: {both} contradict each other: fix the file")
            whole |= value
            place = place or (key if value else "")
        section = Settings(whole, self._architecture, inert, f"{self._place}{place or keys[0]}.")
        self._sections.append(section)
        return section

    def require(self, values: Mapping[str, Any], instead: str) -> None:
        """Refuse keys that are there with another value than ours stands for."""
        for key, value in values.items():
            if self.get(key, value) != value:
                self.refuse(key, instead)

    def refuse(self, key: str, instead: str) -> NoReturn:
        """Raise the one line for a setting of theirs that ours lacks."""
        value = _quoted(self._configuration.get(key))
        raise UserError(f"config.json: {self._architecture} with {self._place}{key}={value} cannot be read: {instead}")

    def _wrong(self, key: str, value: Any, belongs: str) -> NoReturn:
        there = "is missing" if value is None else f"is {_quoted(value)}"
        raise UserError(f"config.json: {self._place}{key} {there}, but must be {belongs}: fix the file")


def _quoted(value: Any) -> str:
    """A value as Python writes it, cut short."""
    return brief(repr(value[:100]) if isinstance(value, str) else value, 40)


def notes(configuration: Configuration, architecture: str) -> list[str]:
    """What of a config.json is left out on purpose, a line each: dropout and noise of training, and code of its own."""
    lines = [
        f"config.json: {key}={_quoted(configuration[key])} acts only in training, where ours lacks it: it is left out"
        for key in sorted(TRAINING_ALONE)
        if configuration.get(key)
    ]
    if configuration.get("auto_map"):
        lines.append(
            f"config.json: auto_map names code of the folder's own, which is not run: it is read as {architecture}"
        )
    return lines
