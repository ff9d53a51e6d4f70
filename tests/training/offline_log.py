"""Reads what an offline run of the tracker's client holds."""

import json
import struct
from pathlib import Path


def records(folder):
    """What an offline run holds: its log is one of framed messages, 32 KiB a block (the client has no reader of its own any more)."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        whole = part if kind in (1, 2) else whole + part  # 1: all of a message, 2, 3, 4: its first, middle and last part
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record.WhichOneof("record_type"), record


def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def held(folder):
    found = {"history": [], "summary": {}, "artifact": []}
    for kind, record in records(folder):
        if kind == "run":
            found["run"], found["config"] = record.run, values(record.run.config.update)
        elif kind == "history":
            row = values(record.history.item)
            found["history"].append({"_step": record.history.step.num, **row})
        elif kind == "summary":
            found["summary"].update(values(record.summary.update))
        elif kind == "artifact":
            found["artifact"].append(record.artifact)
    return found
