"""4-bit codes made into weights two at a time, in PTX: one instruction of three rounds."""


def _asm(kind: str, magic: int) -> str:
    """Two words of codes, for each a pair of zeros and a pair of scales -> 8 pairs.

    A code is the last bits of a number whose unit is 1, so that one instruction masks it and makes
    it that number; all steps but the last one are exact.
    """
    lines = [
        f"shr.u32 t, ${8 + word}, {4 * place}; lop3.b32 t, t, 0x000f000f, {magic:#x}, 0xEA; "
        f"sub.rn.{kind} t, t, ${10 + word}; mul.rn.{kind} ${4 * word + place}, t, ${12 + word};"
        for word in range(2)
        for place in range(4)
    ]
    return "{ .reg .b32 t; " + " ".join(lines) + " }"


BF16_MAGIC, F16_MAGIC = 0x43004300, 0x64006400
"""128.0 in bfloat16 and 1024.0 in float16, twice."""
BF16_PAIRS, F16_PAIRS = _asm("bf16x2", BF16_MAGIC), _asm("f16x2", F16_MAGIC)
REGISTERS = ",".join(["=&r"] * 8 + ["r"] * 6)
