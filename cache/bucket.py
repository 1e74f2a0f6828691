"""Stores in a bucket: any service that speaks S3 and knows conditional writes.

One PUT is whole or absent, and whoever reads after it sees it, so nothing is written under another
name first.  A bucket has no locks: an object that only conditional PUTs change stands for one.
Endpoint and credentials are found as boto3 finds them (AWS_ENDPOINT_URL, AWS_PROFILE, ...).
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
)

from evenlight.cache.errors import OutOfReach, StoreError, UsageError, one_line
from evenlight.cache.files import holder_of, new_token
from evenlight.cache.place import BUCKET, LOCK

AT_ONCE = 16  # requests: one takes tens of milliseconds, nearly all of it waiting
BATCH = 64  # files that are asked for before the first is given out
TRIES = 3  # to read what an answer holds; boto3 repeats requests, but not those cut off after that
LEASE = 60.0  # seconds without renewal after which a lock is nobody's: what a killed run costs
RENEWALS = 6  # in a lease: five may fail, or come late, before a living run loses its lock
_ETAG_OF_NOTHING = '"d41d8cd98f00b204e9800998ecf8427e"'  # of an object without content
# Answers that tell something of the object, by the number of the OSError that a disk would raise;
# 409 and 412: a condition of a PUT does not hold (any more).
_TELLING = {404: errno.ENOENT, 409: errno.EEXIST, 412: errno.EEXIST}


class Bucket:
    """The objects of a bucket under a prefix, as a `Place`."""

    folder = None

    def __init__(self, url: str, *, lease: float = LEASE) -> None:
        """url: s3://BUCKET/PREFIX.  lease: seconds, of the lock."""
        self.bucket, _, self.prefix = url.removeprefix(BUCKET).strip("/").partition("/")
        if not self.bucket:
            raise UsageError(f"{url} names no bucket: expected {BUCKET}BUCKET/FOLDER")
        self.where = url.rstrip("/")
        self.lease = lease
        # 10 s: a host that is not there must not hold up a run for minutes.
        config = Config(max_pool_connections=AT_ONCE, connect_timeout=10)
        try:
            self._client = boto3.client("s3", config=config)
        except (BotoCoreError, ValueError) as error:  # no such profile, an endpoint that is no URL
            raise self._out_of_reach(one_line(error)) from error

    def at(self, name: str) -> str:
        return f"{self.where}/{name}"

    def names(self, folder: str = "") -> list[str]:
        prefix = self._key(folder and f"{folder}/")
        found = []
        with self._asking():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/"):
                found += [entry["Key"] for entry in page.get("Contents", ())]
                found += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        # A key that is the prefix itself is how some programs make a folder.
        return sorted(name for key in found if (name := key.removeprefix(prefix).rstrip("/")))

    def read(self, name: str) -> bytes:
        with self._asking():
            for left in reversed(range(TRIES)):
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
                try:
                    data: bytes = answer["Body"].read()
                    break
                except (HTTPClientError, IncompleteReadError):
                    if not left:
                        raise
        return data

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        def read(name: str) -> bytes | OSError:
            try:
                return self.read(name)
            except OSError as error:
                return error

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for start in range(0, len(names), BATCH):
                yield from pool.map(read, names[start : start + BATCH])

    def write(self, name: str, data: bytes) -> None:
        with self._asking():
            self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data)

    def write_many(self, named: Iterable[tuple[str, bytes]]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for written in [pool.submit(self.write, name, data) for name, data in named]:
                written.result()

    def remove(self, name: str) -> None:
        with self._asking():
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def remove_folder(self, folder: str, *, last: str) -> None:
        others = [f"{folder}/{name}" for name in self.names(folder) if name != last]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self.remove, others))
        self.remove(f"{folder}/{last}")

    def lock(self) -> "BucketLock":
        return BucketLock(self)

    def holder(self) -> str:
        return self.look().token

    def clean(self) -> None:
        pass  # a PUT that was cut off left nothing

    def room(self) -> str:
        return ""

    def look(self) -> "LockState":
        """The lock as it is now."""
        try:
            with self._asking():
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(LOCK))
                text = answer["Body"].read().decode("ascii", errors="replace")
        except FileNotFoundError:
            return LockState("", "", 0)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        age = (now - answer["LastModified"]).total_seconds()
        return LockState(text.partition("\n")[0], answer["ETag"], age)

    def change_lock(self, text: str, etag: str) -> str:
        """Write the lock if it still has this ETag ("": if there is none); returns its new one.

        Raises FileExistsError or FileNotFoundError where it has not.
        """
        condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        with self._asking():
            answer = self._client.put_object(
                Bucket=self.bucket, Key=self._key(LOCK), Body=text.encode("ascii"), **condition
            )
        return str(answer["ETag"])

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn what boto3 raises into the OSError of a disk, where the answer tells of the object
        itself, else into OutOfReach.  Neither holds credentials."""
        try:
            yield
        except ClientError as error:
            answer: Any = error.response
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            why = answer.get("Error", {}).get("Message") or f"HTTP status {status}"
            said = f"{error.operation_name}: {why}"  # which permission lacks, say
            if status in _TELLING and answer["Error"].get("Code") != "NoSuchBucket":
                raise OSError(_TELLING[status], said) from error
            raise self._out_of_reach(said) from error
        except BotoCoreError as error:  # no network, no credentials
            raise self._out_of_reach(one_line(error)) from error

    def _out_of_reach(self, why: str) -> OutOfReach:
        return OutOfReach(
            f"store {self.where} cannot be reached ({why}): put that right and run the same "
            "command again, which goes on from what is complete"
        )


@dataclass(frozen=True)
class LockState:
    """A lock as a bucket shows it.  token: of its holder, "" where it is free.  etag: "" where
    there is no object.  age: seconds since it was written, by the clock of the service."""

    token: str
    etag: str
    age: float


class BucketLock:
    """One writer at a time: an object that its holder renews, as long as it lives.

    Every change of it is a PUT on the condition that nobody changed it since it was looked at, so
    two contenders cannot both take it.  One that has not been renewed for a whole lease may be
    taken over; who lost it so finds another token there before the next commit.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.token = ""
        self._bucket = bucket
        self._etag = ""
        self._renewals = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._process = 0  # that took it

    @property
    def held(self) -> bool:
        """This process took it, and has not given it back; False in a forked child."""
        return self._process == os.getpid()

    def __enter__(self) -> Self:
        found = self._bucket.look()
        if found.token and found.age < self._bucket.lease:
            raise self._refusal(found)
        self.token = new_token()
        if not self._change(found.etag):
            raise self._refusal(self._bucket.look())
        self._refuse_unconditional()
        self._process = os.getpid()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.held:
            return
        self._process = 0
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError, OutOfReach):  # it ends with its lease, or is another's
            self._bucket.change_lock("", self._etag)

    def _refuse_unconditional(self) -> None:
        """Raise StoreError where the service writes though a condition does not hold: there two
        runs could both take the lock."""
        for etag in ("", _ETAG_OF_NOTHING):  # there is an object now, and it says something
            try:
                self._bucket.change_lock(self.token, etag)
            except FileExistsError:
                continue
            raise StoreError(
                f"store {self._bucket.where} cannot be locked: its service knows no conditional "
                "writes (If-Match, If-None-Match): keep it in AWS S3, or in another that does"
            )

    def _renew(self) -> None:
        while not self._ended.wait(self._bucket.lease / RENEWALS):
            with contextlib.suppress(OutOfReach):  # it may answer again before the lease ends
                if not self._change(self._etag):
                    return  # taken over

    def _change(self, etag: str) -> bool:
        """Write our token over the lock of this ETag; False where it is another's now."""
        self._renewals += 1  # other content each time, else the ETag would stay as it is
        try:
            self._etag = self._bucket.change_lock(f"{self.token}\n{self._renewals}\n", etag)
        except (FileExistsError, FileNotFoundError):
            # Or is ours: boto3 repeats a PUT whose answer was lost, and is then refused.
            found = self._bucket.look()
            if found.token != self.token:
                return False
            self._etag = found.etag
        return True

    def _refusal(self, found: LockState) -> StoreError:
        try:
            holder = holder_of(found.token)
        except (ValueError, KeyError, TypeError):
            holder = "another process that has not said its name"
        left = max(0, self._bucket.lease - found.age)
        return StoreError(
            f"store {self._bucket.where} is in use by {holder}; if it was killed, "
            f"its lock is free in {left:.0f} seconds"
        )
