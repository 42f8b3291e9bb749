"""Strings that look like personal data: a pattern for each kind, and a check of what the pattern matched."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

MAYBE_PERSONAL = r"@|\pN[\pN ()./+-]{5,}\pN"
"""RE2 pattern that each text with personal data matches; only these texts are searched."""
BEFORE, AFTER = r"(?<![\w.+-])(?<!\d[ (,])", r"(?![\w-])(?![.,]\d)(?! [+-]?\d)"
"""A match is neither part of a word or a decimal, nor a term of a sequence of numbers."""
NOT_DIGITS = re.compile(r"\D")
CARD_NUMBER = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|35\d{14}|6(?:011|4[4-9]\d|5\d\d|2\d\d)\d{12,15}"
)
"""Prefixes and lengths of the issuers (ISO/IEC 7812): Visa, Mastercard, American Express, Diners, JCB, Discover,
UnionPay."""
SERVERS = frozenset({"git", "hg", "svn"})
"""Users of version control servers, as in ``git@github.com:owner/name``."""
FILES = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "js", "css", "py"})
"""Endings of file names, as in ``icon@2x.png``."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of personal data."""

    pattern: re.Pattern[str]
    check: Callable[[str], bool] = bool
    """Whether a match of the pattern counts."""

    def found_in(self, text: str) -> bool:
        """Whether a text contains a match that counts."""
        return any(self.check(match.group()) for match in self.pattern.finditer(text))


def luhn(number: str) -> bool:
    """Whether the digits of a number pass the Luhn test (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in reversed(number)]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def personal(text: str) -> int:
    """Bits of the kinds of ``PERSONAL`` that a text contains."""
    return sum(1 << k for k, kind in enumerate(PERSONAL.values()) if kind.found_in(text))


def _is_email(address: str) -> bool:
    user, _, host = address.partition("@")
    return user.lower() not in SERVERS and host.rsplit(".", 1)[-1].lower() not in FILES


def _is_card(number: str) -> bool:
    digits = NOT_DIGITS.sub("", number)
    return bool(CARD_NUMBER.fullmatch(digits)) and luhn(digits) and not _is_sequence(number)


def _is_sequence(number: str) -> bool:
    """Whether the groups of digits are equally far apart or double each time: numbers, not the parts of one."""
    groups = [int(group) for group in re.findall(r"\d+", number)]
    pairs = list(itertools.pairwise(groups))
    return len(groups) > 2 and (len({b - a for a, b in pairs}) == 1 or all(b == 2 * a for a, b in pairs))


def _is_phone(number: str) -> bool:
    return not all(group.endswith("00") for group in re.findall(r"\d+", number))


def _is_international(number: str) -> bool:
    """E.164 numbers have at most 15 digits; one with a single point is a decimal."""
    return 8 <= len(NOT_DIGITS.sub("", number)) <= 15 and not re.fullmatch(r"\+\d+\.\d+", number)


def _is_address(text: str) -> bool:
    """Whether four numbers are the address of a machine: no mask or loopback; of single digits they are a version."""
    numbers = [int(part) for part in text.split(".")]
    return max(numbers) <= 255 and numbers[0] not in (0, 127, 255) and max(numbers) >= 10


PERSONAL = {
    "e-mail address": Kind(re.compile(r"[\w.+-]+@(?:[\w-]+\.)+[a-zA-Z]{2,}"), _is_email),
    "card number": Kind(
        re.compile(
            rf"{BEFORE}(?:\d{{13,19}}|\d{{4}}([ -])\d{{4}}\1\d{{4}}\1\d{{1,4}}(?:\1\d{{3}})?"
            rf"|\d{{4}}([ -])\d{{6}}\2\d{{4,5}}){AFTER}",
            re.ASCII,
        ),
        _is_card,
    ),
    "phone number": Kind(
        re.compile(
            rf"{BEFORE}(?:1[ .-])?(?:\(\d{{2,4}}\)[ -]?\d{{3}}[ .-]\d{{3,4}}|\d{{3}}([.-])\d{{3}}\1\d{{4}}"
            rf"|[2-9]\d\d \d{{3}}[ -]\d{{4}}){AFTER}",
            re.ASCII,
        ),
        _is_phone,
    ),
    "international phone number": Kind(
        re.compile(
            r"(?<![\w.)\]+])(?<!\d )(?:\+[1-9]\d{0,2}|00[1-9]\d{0,2}(?=[ .(/-]))(?:[ .()/-]{0,2}\d{1,12}){1,7}"
            r"(?!\w|[.,]\d)",
            re.ASCII,
        ),
        _is_international,
    ),
    "social security number": Kind(re.compile(rf"{BEFORE}\d{{3}}-\d{{2}}-\d{{4}}{AFTER}", re.ASCII)),
    "IP address": Kind(
        re.compile(r"(?<![\w.-])(?<!version )\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d|-)", re.ASCII | re.IGNORECASE),
        _is_address,
    ),
}
"""The kinds of personal data; a survey stores their places in this order as bits."""
