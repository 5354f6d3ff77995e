"""Texts that tokenizers cut in different ways: words, numbers, spaces, scripts, code, emoji, and mixtures of them."""

import random

PARTS = [
    "The capital of France is Paris", "don't", "we'LL", "I'm", "naïve café", "straße", "ﬁn", "e\u0301",
    "你好，世界", "こんにちは", "Привет, мир!", "مرحبا", "שלום", "ไทย", "😀👩‍👩‍👧", "½ ² Ⅻ", "1234567", "3.14159",
    "x1y22z333", "0xDEADBEEF", "1,000,000", "def f(x):\n    return x ** 2\n", "if (a != b) { a += 1; }",
    "<div class=\"y\">", "http://a.b/c?d=e&f=%20", "\t\tindented", "\n\n\n", "   ", " ", "\r\n", "trailing  ",
    "  leading", "...!?", "--- ###", "$\\alpha_{i}^2$", "\u00a0", "\u200b", "\x00\x01", "ALLCAPS",
    "camelCaseWord", "snake_case_word", "“quotes”", "a", "",
]  # fmt: skip


def texts(count: int = 200, seed: int = 0) -> list[str]:
    """Every part alone, then random mixtures of up to six; the same ones each time."""
    draw = random.Random(seed)
    mixed = ["".join(draw.choices(PARTS, k=draw.randint(2, 6))) for _ in range(count - len(PARTS))]
    return PARTS + mixed
