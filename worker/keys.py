"""Every Redis key of the job system, and the Lua scripts that work on them.

Scripts get the same names and the same table of transitions, so nothing is spelled twice.
"""

import json
from importlib.resources import files

from worker.job import TERMINAL_STATUSES, TRANSITIONS

KEYS = {
    "job": "trainmaster:job:",  # + id: hash, a field for each of a Job's, and the job system's own
    "events": "trainmaster:events:",  # + id: stream of the run's events, ids {attempt}-{seq}
    "changes": "trainmaster:changes:",  # + id: stream of status changes
    "jobs": "trainmaster:jobs",  # zset: job id by its number, for lists
    # + "field:value", "label:key" or "label:key=value": zset of the jobs that have it, by number
    "index": "trainmaster:index:",
    "readers": "trainmaster:readers:",  # + id: zset of the jobs not ended that read that one's files
    "alike": "trainmaster:alike:",  # + likeness: zset of the runs that succeeded in one attempt
    "ended": "trainmaster:ended",  # zset of ended jobs by when they ended; later, if they could not be archived then
    "sweep": "trainmaster:sweep",  # there, while no other process is to archive ended jobs
    "waiting": "trainmaster:waiting:",  # + pool: zset of the jobs that have not started, by number
    "pools": "trainmaster:pools",  # set of the pools that have such jobs
    "totals": "trainmaster:totals",  # hash: jobs ever started, and how many seconds they waited for that
    "schema": "trainmaster:schema",  # hash: version of all these keys, and how far a migration to it came
    "revision": "trainmaster:revision",  # when a script last ran that may have changed a job: answers are kept by it
    "number": "trainmaster:number",  # counter behind those numbers
    "idempotency": "trainmaster:idempotency:",  # + key: hash of job and body's sha256, 24 h
    # + id: '' or 'archived', a week long, for a launcher that was cut off and comes back
    "deleted": "trainmaster:deleted:",
    # + runs root: zset of deleted jobs whose run directories are there and are to be removed, by from when
    "leftovers": "trainmaster:leftovers:",
    "queue": "trainmaster:queue:",  # + pool: zset of waiting job ids by priority, then number
    "line": "trainmaster:line:",  # + pool|shape: zset of those of a queue that need the same, in the same order
    "lines": "trainmaster:lines:",  # + pool: set of the shapes that its waiting jobs have
    "waits": "trainmaster:waits:",  # + pool: hash, shape to what jobs of it wait for
    "passed": "trainmaster:passed:",  # + pool: when jobs were last placed; for 2 s, until the next time
    "rung": "trainmaster:rung:",  # + pool: there, if something has changed since then
    "children": "trainmaster:children:",  # + id: set of the jobs that wait for that one's end
    # zset by end: job id of an attempt under way, and "id/node rank" of its part on each further node
    "leases": "trainmaster:leases",
    "unshipped": "trainmaster:unshipped",  # set of job ids: an attempt was lost, and its last events may be missing
    "nodes": "trainmaster:nodes",  # hash: node id to its record
    "offers": "trainmaster:offers:",  # + pool: hash, node id to its slots as placement reads them
    "node_leases": "trainmaster:node_leases",  # zset: node id by its lease's end
    "drained": "trainmaster:drained",  # set of node ids that take no new job
    "owners": "trainmaster:owners",  # hash: slot id to the job that has it
    "deaf": "trainmaster:deaf",  # zset: slot id by until when it gets no job, its worker having taken none
    "outbox": "trainmaster:outbox",  # list of tickets reserved but not yet handed to RQ
    "tick": "trainmaster:tick",  # when an agent last looked for lost attempts
    "hold": "trainmaster:hold",  # until when nothing is given up or placed, after a gap in looking
    "keys": "trainmaster:keys",  # hash: id of an API key to its record, the secret hashed
    # streams of what was asked of the API, the newest entries of each: nobody who may only submit writes the second
    "audit": "trainmaster:audit",
    "audit_administration": "trainmaster:audit:administration",
    "audit_refusals": "trainmaster:audit:refusals",
    "doorbell": "trainmaster:doorbell:",  # + pool: channel, something to place
}

# scripts that change nothing that a job shows; `reserve` says itself when it does
SHOW_NOTHING = ("list", "census", "renew", "register", "retire", "reserve")


def scripts() -> dict[str, str]:
    """The source of each `lua/{name}.lua`, with the names and the helpers that all scripts share."""
    allowed = {start: dict.fromkeys(ends, True) for start, ends in TRANSITIONS.items()}
    tables = {"K": KEYS, "ALLOWED": allowed, "TERMINAL": dict.fromkeys(sorted(TERMINAL_STATUSES), True)}
    lines = [f"local {table} = {_in_lua(value)}" for table, value in tables.items()]
    parts = {file.name.removesuffix(".lua"): file.read_text("utf-8") for file in (files("worker") / "lua").iterdir()}
    before = "\n".join([*lines, parts.pop("shared")])
    # at the start: the script is executed as a whole, and may return anywhere
    first = {name: "" if name in SHOW_NOTHING else "touch()" for name in parts}
    return {name: f"{before}\n{first[name]}\n{text}" for name, text in parts.items()}


def _in_lua(value: object) -> str:
    """Return a Lua constructor: unlike JSON it is read once, when Redis compiles the script, not in each call."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{json.dumps(key)}] = {_in_lua(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
