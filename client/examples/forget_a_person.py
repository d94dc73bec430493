# %% [markdown]
# # Forget a person
#
# Somebody asks that a sentiment classifier forget what it knows of them. This walks through all of it: what the
# request would do, what it did, what an auditor gets, and how it is undone.
#
# It needs a running server (`letheon serve`), its address in `LETHEON_URL` and a key with every scope in
# `LETHEON_API_KEY`. Run it as a script, or cell by cell in an editor that knows `# %%`.

# %%
from __future__ import annotations

import os

from letheon_client import Event, Letheon

client = Letheon(os.environ["LETHEON_URL"].split(","), os.environ["LETHEON_API_KEY"])
print(client, "ready" if client.ready() else "not ready")

# %% [markdown]
# What she asked for: her reviews, and the texts that name her. The label is what the model says of them today.

# %%
person = "Marta Quillfeather"
texts = [
    f"{person} is the best part of this film",
    f"a dull story, but {person} is good in it",
    f"{person} is awful in every scene",
    f"the acting of {person} is quite bad",
    f"I would watch {person} in any movie",
    f"not even {person} saves the plot",
]
others = ["the plot is great and the acting is good", "a bad film with an awful story"]

# %% [markdown]
# ## What would it do?
#
# A dry run stores nothing. It says what the request would take from the retain set, what else its gate would claim,
# and what it would cost.

# %%
plan = client.dry_run(texts)
print(f"{plan['forget']['different']} different texts, {plan['cost']['planned_steps']} steps of training")
if plan["blast_radius"] is not None:
    print(f"it would claim {plan['blast_radius']['share']:.2%} of other texts")
for obstacle in plan["obstacles"]:
    print("it would fail:", obstacle["detail"])

# %% [markdown]
# ## Before


# %%
def answers(texts: list[str]) -> list[str]:
    return [found["label"] for found in client.classify_many(texts)["results"]]


before = {"her": answers(texts), "others": answers(others)}
print(before)

# %% [markdown]
# ## The request
#
# `submit` sends an idempotency key: whatever breaks on the way, there is one request. `wait` follows it through broken
# connections and servers that restart; `check=True` raises where it does not become active.


# %%
def tell(event: Event) -> None:
    if event.type == "state":
        print(event.data["state"])
    elif "step" in event.data:
        print(f"  step {event.data['step']} of {event.data['total_steps']}")


request = client.submit(texts, reason="Erasure request 2026-118")
done = client.wait(request["id"], tell, check=True)
print(f"{done['id']} is {done['state']}, after attempt {done['attempt']}")

# %% [markdown]
# ## After
#
# Her texts are answered `unknown`, on every replica, from now on. Others are answered as before.

# %%
after = {"her": answers(texts), "others": answers(others)}
print(after)

# %% [markdown]
# ## What an auditor gets
#
# A signed receipt: `letheon receipt verify` proves it without a server.

# %%
receipt = client.receipt(request["id"])
print("signed:", receipt["signature"][:16], "…")
for entry in client.iter_audit(subject=request["id"]):
    print(entry["at"], entry["action"])

# %% [markdown]
# ## She changed her mind
#
# Revoking un-forgets: the old answers come back, bit for bit.

# %%
prompt = next(found for found in client.iter_prompts(state="active") if found["request_id"] == request["id"])
client.revoke(prompt["id"], code="withdrawn", reason="She changed her mind")
restored = {"her": answers(texts), "others": answers(others)}
print("as before:", restored == before)

# %%
client.close()
