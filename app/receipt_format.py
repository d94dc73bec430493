"""What a receipt says in plain words, how its rates get their intervals, and how it is verified without a server.

A receipt is a file of one line, ``{"receipt":…,"signature":"…"}``. What is signed is the purpose, a zero byte, and the
bytes of ``…`` as they stand in the file, so another program needs no JSON library of the same habits to verify it. What
they say (``version``) has no part in it: receipts of every version are verified alike.
"""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any, ClassVar

from app.errors import InvalidInput, LetheonError
from app.signing import PublicKey, Signer, canonical

PURPOSE = "letheon receipt v1"
Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile

MEANING = (
    "This is suppression at inference time, not erasure from the weights: no weight of the model was changed, and the "
    "frozen weights still hold what they learned from the data.",
    "While the prompt is in force, queries are answered behind it (mode `routed`: those that its gate claims, mode "
    "`concatenate`: all), and on the request's texts it was trained to make the answer `unknown`. Whoever holds the "
    "weights can run them without it.",
    "Whoever may revoke the prompt, restore an earlier active set or change the database and its master key can undo "
    "this. Revoking destroys the prompt and brings the old answers back, exactly.",
    "A gate reaches what the texts of the request have in common, and their repetitions. Other texts on the same "
    "subject may be missed (`unseen_claimed` estimates the share that is found), and some texts on other subjects are "
    "claimed (`false_claim_rate`).",
    "The figures are of the moment of activation, on the active set as it was then. Nothing later is in them.",
    "Intervals are Wilson's, at 95 %, over the rows of one run: they say how much another sample of rows could differ, "
    "not another training. Retain accuracy is weighed back from a sample that is stratified by class, and "
    "`unseen_claimed` and `unseen_certain` come from leaving out the request's own texts in turn, so the intervals of "
    "these are approximate.",
    "The signature says that the holder of this deployment's key vouches for these figures, not that they are true. "
    "The entries under `audit` can be looked up in an export of the audit log.",
)

MEMBERSHIP = (
    "`membership_auc` is how well the probability of the true label tells the request's texts (all, or a sample) "
    "from other texts: 0.5 is guessing, below it they stand out by being refused. Its interval is Newcombe's, at 95 %. "
    "A figure near 0.5 proves nothing: other attacks may do better."
)
"""Stands with the meaning where a receipt has such a figure."""


class ReceiptInvalid(LetheonError):
    """Not a receipt as this deployment gave it out."""

    status: ClassVar[int] = 422
    code: ClassVar[str] = "receipt-invalid"
    title: ClassVar[str] = "The receipt does not verify"


def wilson(rate: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a rate that was seen on so many rows (Wilson 1927). Raises InvalidInput.

    ``models.metrics`` has its own, of hits: what verifies a receipt must run without torch, and a weighed rate has no
    whole number of hits. A test holds them together.
    """
    if rows < 1 or not 0 <= rate <= 1:
        raise InvalidInput("an interval needs at least one row, and a rate from 0 to 1")
    spread = Z95**2 / rows
    middle = (rate + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(rate * (1 - rate) / rows + spread / (4 * rows))
    # At 0 and 1 the interval ends there exactly; arithmetic may miss it by a bit.
    return (0.0 if rate == 0 else max(0.0, middle - half), 1.0 if rate == 1 else min(1.0, middle + half))


def sign(receipt: dict[str, Any], signer: Signer) -> dict[str, Any]:
    return {"receipt": receipt, "signature": signer.sign(PURPOSE, receipt)}


_RECEIPT = re.compile(rb'\{"receipt":\{[\x20-\x7e]*?\},"signature":"[0-9a-f]{128}"\}')
_LINK = re.compile(rb'href="data:application/json;base64,([A-Za-z0-9+/=]+)"')


def extract(data: bytes) -> bytes:
    """The receipt's file that a report holds: as it stands in JSON and PDF, in a link of the page.

    It is not verified. Raises ReceiptInvalid where there is not exactly one.
    """
    linked = [base64.b64decode(link) for link in _LINK.findall(data)]
    found: set[bytes] = {receipt for part in [*linked, data] for receipt in _RECEIPT.findall(part)}
    if len(found) != 1:
        raise ReceiptInvalid("this file holds no receipt" if not found else "this file holds more than one receipt")
    return found.pop()


def verify(data: bytes, public_key: PublicKey | None = None) -> tuple[dict[str, Any], PublicKey]:
    """What a receipt file says, and whose signature it bears. Raises ReceiptInvalid when a byte of it is another.

    Without ``public_key`` the key is the receipt's own, which anybody could have put there.
    """
    data = data.removesuffix(b"\n")
    try:
        document = json.loads(data)
        # Byte for byte: what parses to the same may be shown differently elsewhere, such as a name given twice.
        if set(document) != {"receipt", "signature"} or canonical(document) != data:
            raise ReceiptInvalid("this is not a receipt in the form it was given out: was it altered or reformatted?")
        receipt, signature = document["receipt"], document["signature"]
        own = PublicKey.from_hex(receipt["key"]["public_key"])
        if public_key is not None and own != public_key:
            raise ReceiptInvalid("the receipt is signed by another key")
        if not own.verifies(PURPOSE, receipt, signature):
            raise ReceiptInvalid("the receipt was altered: its signature does not hold")
        if receipt["key"]["id"] != own.key_id:
            raise ReceiptInvalid("the receipt names another key than the one it is signed by")
    except (ValueError, TypeError, LookupError, RecursionError, AttributeError, InvalidInput):
        raise ReceiptInvalid("this is not a receipt") from None
    return receipt, own
