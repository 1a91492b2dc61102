"""A foreign MQTT client (paho, QoS 1) that publishes numbered readings and keeps its own list of what was acknowledged.

It is the witness: a reading counts as sent when the broker's acknowledgement reached this client, and only then.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

#: Readings under way at a time. With more than one, a client that reconnects may itself send a later reading before it
#: repeats an earlier one (MQTT 3.1.1, 4.6; paho does); whoever needs order sends the next after the acknowledgement.
IN_FLIGHT = 1


class Publisher:
    def __init__(
        self, url: str, user: str, password: str, *, rate: float = 100.0, topic: str = "sensors/line1/temperature"
    ) -> None:
        self._parts = urlsplit(url)
        self._topic, self._rate = topic, rate
        self._acked: set[int] = set()
        self._mids: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.next_id = 1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="foreign-publisher", clean_session=False)
        self._client.username_pw_set(user, password)
        self._client.reconnect_delay_set(min_delay=1, max_delay=1)
        self._client.max_inflight_messages_set(IN_FLIGHT)
        self._client.on_publish = self._published

    def _published(self, client: Any, userdata: Any, mid: int, *_: Any) -> None:
        with self._lock:
            reading = self._mids.pop(mid, None)
            if reading is not None:
                self._acked.add(reading)

    def acked(self) -> set[int]:
        with self._lock:
            return set(self._acked)

    def acked_count(self) -> int:
        with self._lock:
            return len(self._acked)

    def start(self) -> None:
        self._client.connect_async(str(self._parts.hostname), self._parts.port or 1883, keepalive=10)
        self._client.loop_start()
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(1 / self._rate):
            with self._lock:
                if len(self._mids) >= IN_FLIGHT:
                    continue
                doc = {"id": self.next_id, "celsius": 20 + self.next_id % 7, "at": round(time.time(), 3)}
                info = self._client.publish(self._topic, json.dumps(doc), qos=1)
                self._mids[info.mid] = self.next_id
                self.next_id += 1

    def end(self, wait: float = 10.0) -> None:
        """Stops publishing, waits for the acknowledgements that are under way, disconnects."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(5)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            with self._lock:
                if not self._mids:
                    break
            time.sleep(0.02)  # paho has no event for "all acknowledged"
        self._client.disconnect()
        self._client.loop_stop()
