"""The units of an adaptive decoder (designs L and H).

A `SwitchLayout` is a small frozen value, made from a Hugging Face config. It gives the number of
units and the query heads, key/value heads and MLP channels of each. It holds no tensors and imports
no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal


def text_config_of(config: Any) -> Any:
    """Return the decoder's config: `config.text_config` if there is one, else `config`."""
    inner = getattr(config, "text_config", None)
    return config if inner is None else inner


def _dimension(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{type(config).__name__}.{name} is {value!r}; a decoder config with a positive "
            f"integer {name} is needed (Llama, Mistral, Qwen2, Phi, or a model that contains one)"
        )
    return value


@dataclass(frozen=True)
class SwitchLayout:
    """The units of one decoder, numbered 0..K-1 from the first switchable layer upwards.

    Design "layers" (L): one unit per layer; a layer that is off is the identity. Design "heads"
    (H): `units_per_layer` units per layer, each a range of complete key/value groups (a K/V head
    can only be off together with all its query heads) and a proportional range of MLP channels.
    Source: dissertation chapter 5.

    Raises:
        ValueError: the numbers cannot belong to a decoder.
    """

    design: Literal["layers", "heads"]
    num_layers: int
    first: int  # first switchable layer; the layers below always run
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    #: query heads of a full unit: all in design L; in H a layer's last unit may be smaller
    unit: int

    def __post_init__(self) -> None:
        if self.design not in ("layers", "heads"):
            raise ValueError(f"design is {self.design!r}; it must be 'layers' or 'heads'")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                extra = ""
                if field.name == "first" and isinstance(self.num_layers, int):
                    extra = f" from 1 to {self.num_layers - 1} (num_layers - 1)"
                raise ValueError(f"{field.name} is {value!r}; it must be a positive integer{extra}")
        if self.num_layers < 2:
            raise ValueError(
                "num_layers is 1; a decoder needs a layer that always runs and one to skip"
            )
        if self.first > self.num_layers - 1:
            raise ValueError(
                f"first is {self.first}; the first switchable of {self.num_layers} decoder layers "
                f"must be in 1..{self.num_layers - 1} (the layers below it always run)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.intermediate_size < self.num_heads:
            raise ValueError(
                f"intermediate_size {self.intermediate_size} is smaller than num_heads "
                f"{self.num_heads}; every head group needs at least one MLP channel"
            )
        if self.unit % self.group and self.unit != self.num_heads:
            raise ValueError(
                f"unit {self.unit} is not a multiple of {self.group}, "
                "the query heads of one key/value group"
            )

    @classmethod
    def layers(cls, text_config: Any, first: int | None = None) -> SwitchLayout:
        """Return design L: one unit per layer from `first` (default: num_layers // 2) upwards."""
        dimensions = _read(text_config)
        return cls(
            "layers", first=_first(first, dimensions), unit=dimensions["num_heads"], **dimensions
        )

    @classmethod
    def heads(cls, text_config: Any, first: int | None = None, unit: int = 8) -> SwitchLayout:
        """Return design H: units of about `unit` query heads, aligned to key/value groups.

        A unit is max(1, unit // group) key/value groups (group = query heads per K/V head), at most
        a complete layer. Where that does not divide the layer, its last unit is smaller.
        """
        if isinstance(unit, bool) or not isinstance(unit, int) or unit < 1:
            raise ValueError(f"unit is {unit!r}; it must be a positive number of query heads")
        dimensions = _read(text_config)
        group = max(1, dimensions["num_heads"] // dimensions["num_kv_heads"])
        heads_per_unit = min(max(1, unit // group) * group, dimensions["num_heads"])
        return cls("heads", first=_first(first, dimensions), unit=heads_per_unit, **dimensions)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def units_per_layer(self) -> int:
        """Units of each switchable layer (1 in design L)."""
        return -(-self.num_heads // self.unit)

    @property
    def num_units(self) -> int:
        """K, the number of units."""
        return (self.num_layers - self.first) * self.units_per_layer

    def unit_slices(self, unit_in_layer: int) -> tuple[slice, slice, slice]:
        """Return the query heads, key/value heads and MLP channels of a layer's unit.

        The slices of a layer's units are disjoint and cover the layer. MLP boundaries are
        intermediate_size * head // num_heads, so that units of equally many heads differ by at most
        one channel (13B: 13824 channels over 40 heads).
        """
        if not 0 <= unit_in_layer < self.units_per_layer:
            raise ValueError(
                f"unit {unit_in_layer} of a layer is not in 0..{self.units_per_layer - 1}"
            )
        start = unit_in_layer * self.unit
        end = min(start + self.unit, self.num_heads)
        channels = [self.intermediate_size * head // self.num_heads for head in (start, end)]
        return (
            slice(start, end),
            slice(start // self.group, end // self.group),
            slice(channels[0], channels[1]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SwitchLayout:
        """Return the layout that `to_dict` wrote; ValueError names missing and unknown keys."""
        names = {field.name for field in fields(cls)}
        missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
        if missing or unknown:
            raise ValueError(f"switch layout: missing keys {missing}, unknown keys {unknown}")
        return cls(**values)


def _first(first: int | None, dimensions: Mapping[str, int]) -> int:
    # max(1, ...) so that a decoder of one layer gets the error about num_layers
    return max(1, dimensions["num_layers"] // 2) if first is None else first


def _read(config: Any) -> dict[str, int]:
    """Read a layout's dimensions from any Hugging Face decoder config."""
    config = text_config_of(config)
    if getattr(config, "__dict__", {}).get("_heterogeneity_spec") is not None:
        raise ValueError(f"{type(config).__name__} has layers of different sizes")
    heads = _dimension(config, "num_attention_heads")
    hidden = _dimension(config, "hidden_size")
    kv_heads = heads
    if getattr(config, "num_key_value_heads", None) is not None:
        kv_heads = _dimension(config, "num_key_value_heads")
    if getattr(config, "head_dim", None) is not None:
        head_dim = _dimension(config, "head_dim")
    elif hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    else:
        head_dim = hidden // heads
    return {
        "num_layers": _dimension(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": _dimension(config, "intermediate_size"),
    }
