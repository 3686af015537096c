"""Many clients at once against rmse-serve, some of which leave: is every answer whole, and the one that the model gives alone?

    python docs/experiments/serve/load.py MODEL [-n 1000] [--clients 16] [--seconds 600]

It starts `rmse-serve MODEL` by itself. Requests are texts of several lengths, dials and kinds of sampling, streamed or not,
conversations of two turns where the model has a chat template, and mistakes. Of those that are streamed every third client
leaves at some point, of the others every eighth. Afterwards all that was asked for is written once more by the same model
in this process, and held against the answers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from rmse_edge.archive import unpacked
from rmse_edge.chat import ChatTemplate, template_source
from rmse_edge.loop.dials import DIALS
from rmse_edge.runtimes import LoopRuntime, open_runtime
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.runtimes.text.writer import Writer, open_tokenizer

NAME = "model"
MISTAKES: tuple[tuple[dict[str, Any], int], ...] = (
    ({"model": "another"}, 404),
    ({"temprature": 1}, 400),
    ({"max_loops": 0}, 400),
    ({"max_tokens": 10**6}, 400),
)


@dataclass
class Plan:
    """One request, or the two of a conversation."""

    body: dict[str, Any]
    turns: list[str] = field(default_factory=list)  # questions; none: it is a text
    leaves: int | None = None  # after so many chunks, or at once where it is not streamed
    status: int = 200
    answers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""


def plans(count: int, words: list[str], chats: bool, max_loops: int, seed: int) -> list[Plan]:
    """`count` requests, the same for the same seed."""
    draw, found = random.Random(seed), []
    for number in range(count):
        body: dict[str, Any] = {"model": NAME, "max_tokens": draw.randint(1, 48), "seed": number}
        body["stream"] = draw.random() < 0.6
        body["temperature"] = draw.choice((0, 0.8, 1.2))
        if draw.random() < 0.3:
            body["max_loops"] = draw.randint(1, max_loops)
        plan = Plan(body)
        if chats and draw.random() < 0.3:
            plan.turns = draw.sample(words, 2)
        else:
            body["prompt"] = "".join(draw.choices(words, k=draw.randint(1, 12)))
        if draw.random() < 0.05:
            change, plan.status = draw.choice(MISTAKES)
            plan.body = body | change
            plan.turns = plan.turns[:1]
        elif draw.random() < (1 / 3 if body["stream"] else 1 / 8):
            plan.leaves = draw.randint(0, 20)
        found.append(plan)
    return found


# ------------------------------------------------------------------------------------------------------------- clients


def ask(port: int, plan: Plan) -> None:
    """Send what is planned, and keep what comes."""
    messages: list[dict[str, str]] = []
    for question in plan.turns or [""]:
        path, body = "/v1/completions", plan.body
        if plan.turns:
            messages.append({"role": "user", "content": question})
            path, body = "/v1/chat/completions", plan.body | {"messages": messages}
        connection = HTTPConnection("127.0.0.1", port, timeout=600)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            if plan.leaves is not None and not body["stream"]:
                return
            response = connection.getresponse()
            if response.status != plan.status:
                plan.problem = f"got {response.status}, expected {plan.status}: {response.read(300)!r}"
                return
            if plan.status != 200:
                if set(json.loads(response.read())["error"]) != {"message", "type", "param", "code"}:
                    plan.problem = "an error of another shape"
                return
            if not body["stream"]:
                choice = json.loads(response.read())["choices"][0]
            else:
                choice = {"text": "", "tokens": [], "depth": []}
                for number, chunk in enumerate(chunks(response)):
                    if number == plan.leaves:
                        return
                    one = chunk["choices"][0]
                    choice["text"] += one["delta"].get("content") or "" if plan.turns else one["text"]
                    choice["tokens"] += one["tokens"]
                    choice["depth"] += one["depth"]
                    choice["finish_reason"] = one["finish_reason"]
            if plan.turns:
                choice["text"] = choice["text"] if body["stream"] else choice["message"]["content"]
                messages.append({"role": "assistant", "content": choice["text"]})
            plan.answers.append({name: choice[name] for name in ("text", "tokens", "depth", "finish_reason")})
        except (OSError, HTTPException, ValueError, KeyError) as error:
            plan.problem = f"{type(error).__name__}: {error}"
            return
        finally:
            connection.close()


def chunks(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    raise ValueError("the stream broke off")


def load(port: int, planned: list[Plan], clients: int, seconds: float) -> tuple[list[float], float, int]:
    """All plans by so many threads, again and again for so many seconds.

    Returns:
        the server's memory in MiB at every tenth of the first round or every ten seconds, seconds in all, requests in all.
    """
    lock, memory, begun, sent = threading.Lock(), [], time.perf_counter(), 0
    every = max(1, len(planned) // 10)

    def client() -> None:
        nonlocal sent
        while True:
            with lock:
                number, sent = sent, sent + 1
                if number >= len(planned) and time.perf_counter() - begun > seconds:
                    sent -= 1
                    return
            plan = planned[number % len(planned)]
            again = number >= len(planned)
            plan = Plan(plan.body, plan.turns, plan.leaves, plan.status) if again else plan
            start = time.perf_counter()
            ask(port, plan)
            plan.seconds = time.perf_counter() - start
            if again and (plan.problem or plan.answers != planned[number % len(planned)].answers):
                planned[number % len(planned)].problem = plan.problem or "another answer, asked once more"
            if number % every == 0:
                memory.append(metric(port, "process_resident_memory_bytes") / 2**20)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return memory, time.perf_counter() - begun, sent


def metric(port: int, name: str) -> float:
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " "))


# ------------------------------------------------------------------------------------------------------------- alone


def check(folder: Path, planned: list[Plan], threads: int) -> None:
    """Hold the answers against what the model writes in this process."""
    runtime = open_runtime(folder, threads=threads)
    assert isinstance(runtime, LoopRuntime)
    tokenizer = open_tokenizer(folder, runtime.info.vocab_size)
    template = ChatTemplate.open(folder) if template_source(folder) else None
    for plan in planned:
        if not plan.answers or plan.problem:
            continue
        body = plan.body
        sampling = Sampling(temperature=body["temperature"], seed=body["seed"])
        dials = runtime.info.dials_asked({name: body.get(name) for name in DIALS})
        writer = Writer(runtime, tokenizer, dials, Sampler(sampling), body["max_tokens"])
        runtime.reset()
        conversation = writer.conversation(template) if template is not None and plan.turns else None
        for answer, question in zip(plan.answers, plan.turns or [""]):
            writer.sampler = Sampler(sampling)
            generation = conversation.ask(question) if conversation else writer.begun(body["prompt"])
            text = "".join(span.text for spans in (generation.spans(), generation.rest()) for span in spans)
            if conversation:
                conversation.answered(generation)
            reason = {"eos": "stop", "max_seq_len": "length"}.get(generation.finish_reason, generation.finish_reason)
            expected = {"text": text, "tokens": generation.tokens, "depth": generation.depth, "finish_reason": reason}
            if answer != expected:
                wrong = next(name for name in expected if answer[name] != expected[name])
                plan.problem = f"{wrong}: got {answer[wrong]!r:.80}, expected {expected[wrong]!r:.80}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", "--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0, help="ask the same again for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args()
    folder = unpacked(args.model)
    sample = folder / "sample.txt"
    text = sample.read_text() if sample.is_file() else "to be or not to be, that is the question. " * 20
    words = sorted(set(re.findall(r"\S{1,12}", text)))[:500]
    command = [sys.executable, "-m", "rmse_edge.cli.serve", str(folder), "--port", "0", "--name", NAME]
    server = subprocess.Popen([*command, "-t", str(args.threads)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2])
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/v1/models")
        model = json.loads(connection.getresponse().read())["data"][0]
        connection.close()
        planned = plans(args.requests, words, model["chat"], model["max_loops"], args.seed)
        memory, seconds, sent = load(port, planned, args.clients, args.seconds)
        for _ in range(600):  # who left is noticed at the next token
            if metric(port, "rmse_running") + metric(port, "rmse_queue") == 0:
                break
            time.sleep(0.1)
        idle = metric(port, "rmse_running") + metric(port, "rmse_queue") == 0
        tokens, left = metric(port, "rmse_generated_tokens_total"), metric(port, "rmse_left_total")
    finally:
        server.terminate()
        server.wait()
    check(folder, planned, args.threads)
    took = sorted(plan.seconds for plan in planned if plan.leaves is None and plan.status == 200)
    kinds = Counter("left" if p.leaves is not None else "refused" if p.status != 200 else "whole" for p in planned)
    problems = [plan for plan in planned if plan.problem]
    whole = sum(len(plan.answers) for plan in planned if not plan.problem)
    half = len(memory) // 2
    print("| | |\n|---|---:|")
    for what, figure in (
        ("requests", f"{sent} in {seconds:.1f} s by {args.clients} clients"),
        ("of the first round", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))),
        ("answers equal to the model's alone", str(whole)),
        ("wrong, lost or broken", str(len(problems))),
        ("requests/s", f"{sent / seconds:.1f}"),
        ("tokens/s", f"{tokens / seconds:.0f}"),
        ("p50, p99 of an answer", f"{took[len(took) // 2]:.2f} s, {took[int(len(took) * 0.99)]:.2f} s"),
        ("left before the end, as the server counts", f"{left:.0f}"),
        ("nothing waits or runs afterwards", "yes" if idle else "NO"),
        ("memory after a tenth, half, all (MiB)", f"{memory[min(1, half)]:.1f}, {memory[half]:.1f}, {memory[-1]:.1f}"),
    ):
        print(f"| {what} | {figure} |")
    for plan in problems[:5]:
        print(f"problem: {plan.problem} of {json.dumps(plan.body)}", file=sys.stderr)
    return int(bool(problems) or not idle)


if __name__ == "__main__":
    raise SystemExit(main())
