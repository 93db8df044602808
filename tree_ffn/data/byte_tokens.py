"""How the tokenizers of the library write bytes: as letters of their own, or as `<0x..>`."""

import json
import re

# What decoders put where bytes are no character.
HALF = "\ufffd"
# A byte as the tokenizers of Llama's kind write it, where they have no token for a character.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def kinds_in(*parts) -> set[str]:
    """The kinds that a tokenizer's parts (normalizer, decoder ...) are made of; None is made of none."""
    kinds, left = set(), [json.loads(part.__getstate__()) for part in parts if part]
    while left:
        state = left.pop()
        kinds.add(state["type"])
        inner = (values for values in state.values() if isinstance(values, list))
        left += [one for values in inner for one in values if isinstance(one, dict) and "type" in one]
    return kinds


def byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level tokenizer stands for (Radford et al., 2019).

    Example:
      >>> byte_alphabet()["a"], byte_alphabet()["Ġ"]
      (97, 32)
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    alphabet = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | dict(zip(letters[len(alphabet) :], others))
