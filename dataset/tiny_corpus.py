"""The instruction → response corpus of the bundled model: six kinds of task, made up here, endless and seeded.

Called by ``scripts/train_tiny.sh`` (training files) and ``scripts/eval_tiny.py`` (held-out prompts). A problem is drawn
from (seed, task, index) alone; the hash of its *content* (never its wording) decides whether it belongs to the training
or to the held-out part, so no held-out problem is ever trained on in any phrasing.

    python dataset/tiny_corpus.py --output_dir runs/tiny/text --samples 300000
    python dataset/tiny_corpus.py --show 2
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

HELD_OUT_SHARE = 8  # one problem in eight is never trained on
HELD_OUT_SEED = 20_000  # of the problems that are asked; training draws with small seeds, and the parts are disjoint anyway

NAMES = """Ada Alan Amir Ana Anna Ben Carl Cleo Dan Dora Elif Emma Eric Eva Finn Gina Hugo Ida Igor Ines Ivan Jack Jana
Juan Kai Lara Lena Leo Lily Lou Luca Mara Max Mia Nina Noah Nora Omar Oscar Paul Petra Rita Rosa Sam Sara Sven Tara Tim
Tom Uma Vera Will Yara Zoe""".split()
CITIES = """Athens Berlin Bern Boston Cairo Delhi Dublin Geneva Hanoi Havana Kyoto Lagos Lima Lisbon London Madrid Milan
Moscow Nairobi Oslo Paris Prague Quito Riga Rome Seoul Sofia Tokyo Turin Vienna Warsaw Zurich""".split()
JOBS = """actor artist baker barber builder carpenter chef clerk cook dancer dentist doctor driver editor farmer gardener
judge lawyer nurse painter pilot plumber poet sailor singer tailor teacher waiter writer""".split()
PETS = "bird cat dog fish frog goat hamster horse lizard mouse parrot pony rabbit snake spider turtle".split()
THINGS = """apples balls beads books boxes buttons cakes candles cards coins cookies cups eggs flowers grapes keys lemons
marbles nuts oranges pears pencils pens plums shells stamps stars stickers stones toys""".split()
BAGS = "bags baskets boxes bowls crates jars packs trays".split()

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen""".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class Problem:
    """One problem: its task, what decides its identity, the instruction as worded, and the one right answer."""

    task: str
    content: str
    instruction: str
    output: str

    @property
    def held_out(self) -> bool:
        """Whether this content is reserved for evaluation.

        The numbers below 100 never are: the words of all others are made of theirs, and nothing else teaches those.
        """
        if self.task == "spell" and int(self.content) < 100:
            return False
        digest = hashlib.sha256(f"{self.task}|{self.content}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def in_words(n: int) -> str:
    """English words of 0 ≤ n < 1,000,000, without "and"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (f" {in_words(n % 100)}" if n % 100 else "")
    return f"{in_words(n // 1000)} thousand" + (f" {in_words(n % 1000)}" if n % 1000 else "")


def spell(r: random.Random) -> Problem:
    """A number in words."""
    n = r.randrange(10 ** r.randint(1, 6))
    wording = r.choice(["Write {} in words.", "Spell out the number {}.", "How do you say {} in English?"])
    return Problem("spell", str(n), wording.format(n), in_words(n))


def add(r: random.Random) -> Problem:
    """Column addition from the right, every carry shown."""
    a, b = (r.randrange(10 ** (k - 1), 10**k) for k in (r.randint(2, 7), r.randint(2, 7)))
    left, right, carry, lines = str(a)[::-1], str(b)[::-1], 0, []
    for i in range(max(len(left), len(right))):
        x, y = (int(s[i]) if i < len(s) else 0 for s in (left, right))
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}, carry {total // 10}")
        carry = total // 10
    wording = r.choice(
        ["Add {} and {}. Show each column.", "Compute {} + {} column by column.", "What is {} + {}? Show your work."]
    )
    return Problem("add", f"{a}+{b}", wording.format(a, b), "\n".join([*lines, f"The sum is {a + b}."]))


def table(r: random.Random) -> Problem:
    """Some consecutive rows of a times table."""
    n, first = r.randint(2, 30), r.randint(1, 12)
    last = first + r.randint(1, 14)
    rows = "\n".join(f"{n} x {k} = {n * k}" for k in range(first, last + 1))
    wording = r.choice(
        [
            "Write the {} times table from {} to {}.",
            "Show the multiples of {} from {} to {}.",
            "List {} times each number from {} to {}.",
        ]
    )
    return Problem("table", f"{n}:{first}-{last}", wording.format(n, first, last), rows)


def count(r: random.Random) -> Problem:
    """Counting up or down in equal steps, from a few numbers to a long line of them."""
    step = r.choice([1, 1, 1, 2, 3, 5, 10])
    first, terms = r.randint(0, 200), r.randint(2, 72)
    last = first + step * (terms - 1)
    if r.random() < 0.3:
        first, last, step = last, first, -step
    numbers = " ".join(str(n) for n in range(first, last + (1 if step > 0 else -1), step))
    by = "" if abs(step) == 1 else f" in steps of {abs(step)}"
    if step > 0:
        wording = r.choice(["Count from {} to {}{}.", "Write the numbers from {} to {}{}.", "Count up from {} to {}{}."])
    else:
        wording = r.choice(["Count down from {} to {}{}.", "Count backwards from {} to {}{}."])
    return Problem("count", f"{first}:{last}:{step}", wording.format(first, last, by), numbers)


def to_json(r: random.Random) -> Problem:
    """Facts about a few people, as a JSON list."""
    people, told = [], []
    for name in r.sample(NAMES, r.randint(1, 4)):
        age, city, job, pet = r.randint(3, 99), r.choice(CITIES), r.choice(JOBS), r.choice(PETS)
        facts = {"age": (age, f"is {age} years old"), "city": (city, f"lives in {city}"),
                 "job": (job, f"works as a {job}"), "pet": (pet, f"has a {pet}")}  # fmt: skip
        keys = r.sample(list(facts), r.randint(1, 4))
        said = [facts[k][1] for k in keys]
        told.append(f"{name} {said[0]}." if len(said) == 1 else f"{name} {', '.join(said[:-1])} and {said[-1]}.")
        people.append({"name": name} | {k: facts[k][0] for k in facts if k in keys})
    wording = r.choice(["Turn these facts into JSON: {}", "Write as JSON. {}", "{} Give me that as a JSON list."])
    text = " ".join(told)
    return Problem("json", text, wording.format(text), json.dumps(people))


def word(r: random.Random) -> Problem:
    """A word problem of two to four steps, worked line by line, ending in ``#### N``."""
    text, lines, answer = r.choice([_possessions, _shopping, _reading, _together, _sharing])(r)
    return Problem("word", text, text, "\n".join([*lines, f"#### {answer}"]))


Story = tuple[str, list[str], int]


def _possessions(r: random.Random) -> Story:
    name, other, thing = *r.sample(NAMES, 2), r.choice(THINGS)
    if r.random() < 0.5:
        a, b, bag = r.randint(2, 12), r.randint(2, 12), r.choice(BAGS)
        text, have = f"{name} has {a} {bag} with {b} {thing} in each.", a * b
        lines = [f"{a} * {b} = {have} {thing} at first."]
    else:
        have = r.randint(5, 99)
        text, lines = f"{name} has {have} {thing}.", []
    for _ in range(r.randint(1 if lines else 2, 3)):
        c = r.randint(2, 60)
        if r.random() < 0.5 or have < 4:
            text += r.choice(
                [f" Then {name} buys {c} more.", f" {name} finds {c} more.", f" {other} gives {name} {c} more."]
            )
            lines.append(f"{have} + {c} = {have + c} after getting {c} more.")
            have += c
        else:
            c = r.randint(1, min(have - 1, 60))
            text += r.choice([f" Then {name} gives {c} to {other}.", f" {name} loses {c} of them.", f" {name} sells {c}."])
            lines.append(f"{have} - {c} = {have - c} after losing {c}.")
            have -= c
    return f"{text} How many {thing} does {name} have now?", lines, have


def _shopping(r: random.Random) -> Story:
    name, (first, second) = r.choice(NAMES), r.sample(THINGS, 2)
    a, p, b, q = (r.randint(2, 9) for _ in range(4))
    x, y = a * p, b * q
    text = f"{name} buys {a} {first} for {p} dollars each and {b} {second} for {q} dollars each."
    lines = [
        f"{a} * {p} = {x} dollars for the {first}.",
        f"{b} * {q} = {y} dollars for the {second}.",
        f"{x} + {y} = {x + y} dollars in all.",
    ]
    if r.random() < 0.5:
        return f"{text} How many dollars does {name} pay?", lines, x + y
    note = r.choice([n for n in (100, 150, 200) if n > x + y])
    lines.append(f"{note} - {x + y} = {note - x - y} dollars back.")
    return f"{text} {name} pays with {note} dollars. How many dollars does {name} get back?", lines, note - x - y


def _reading(r: random.Random) -> Story:
    name, (verb, what) = (
        r.choice(NAMES),
        r.choice([("reads", "pages"), ("writes", "lines"), ("runs", "miles"), ("solves", "puzzles")]),
    )
    a, d, b, e = r.randint(2, 12), r.randint(2, 9), r.randint(2, 12), r.randint(2, 9)
    text = f"{name} {verb} {a} {what} a day for {d} days and then {b} {what} a day for {e} days. How many {what} is that?"
    lines = [
        f"{a} * {d} = {a * d} {what} at first.",
        f"{b} * {e} = {b * e} {what} after that.",
        f"{a * d} + {b * e} = {a * d + b * e} {what} in all.",
    ]
    return text, lines, a * d + b * e


def _together(r: random.Random) -> Story:
    name, other, third = r.sample(NAMES, 3)
    thing, a, k, c = r.choice(THINGS), r.randint(3, 30), r.randint(2, 4), r.randint(2, 30)
    text = f"{name} has {a} {thing}. {other} has {k} times as many as {name}. {third} has {c} more than {other}."
    x = a * k
    lines = [f"{a} * {k} = {x} {thing} for {other}.", f"{x} + {c} = {x + c} {thing} for {third}."]
    if r.random() < 0.4:
        return f"{text} How many {thing} does {third} have?", lines, x + c
    lines += [f"{a} + {x} = {a + x} for {name} and {other}.", f"{a + x} + {x + c} = {a + 2 * x + c} {thing} in all."]
    return f"{text} How many {thing} do they have together?", lines, a + 2 * x + c


def _sharing(r: random.Random) -> Story:
    name, thing, friends, each = r.choice(NAMES), r.choice(THINGS), r.randint(2, 9), r.randint(2, 12)
    total = friends * each
    a = r.randint(1, total - 1)
    text = f"{name} has {a} {thing} and buys {total - a} more. {name} shares them equally among {friends} friends."
    lines = [f"{a} + {total - a} = {total} {thing} to share.", f"{total} / {friends} = {each} {thing} for each friend."]
    return f"{text} How many {thing} does each friend get?", lines, each


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    "spell": spell, "add": add, "word": word, "json": to_json, "table": table, "count": count,
}  # fmt: skip


def problems(task: str, seed: int, *, held_out: bool) -> Iterator[Problem]:
    """Endless problems of one task from one part; problem i depends on (seed, task, i) alone."""
    i = 0
    while True:
        problem = TASKS[task](random.Random(f"{seed}/{task}/{i}"))
        i += 1
        if problem.held_out == held_out:
            yield problem


def fresh_prompts(task: str, seed: int, number: int) -> list[Problem]:
    """``number`` held-out problems with pairwise different content.

    Raises:
        ValueError: the task does not have that many (the times tables have about 600, counting about 10,000).
    """
    found: dict[str, Problem] = {}
    for problem in islice(problems(task, seed, held_out=True), 20 * number):
        found.setdefault(problem.content, problem)
        if len(found) == number:
            return list(found.values())
    raise ValueError(f"task {task} has no {number} different held-out problems (found {len(found)}): ask for fewer.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="folder for train/ and held_out/ (JSON Lines)")
    parser.add_argument("--samples", type=int, default=200_000, help="training samples, the tasks in turn")
    parser.add_argument("--turns", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK",
                        help="the tasks that take turns; one named twice comes twice (default: each once)")  # fmt: skip
    parser.add_argument("--held_out_samples", type=int, default=600, help="samples of the part that is never trained on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, metavar="N", help="print N problems of each task instead")
    args = parser.parse_args()
    for name, least in (("samples", 1), ("held_out_samples", 0), ("seed", 0), ("show", 1)):
        if (given := getattr(args, name)) is not None and given < least:
            parser.error(f"--{name} {given} must be at least {least}")
    if args.show is not None:
        for task in TASKS:
            stream = problems(task, args.seed, held_out=False)
            for _ in range(args.show):
                problem = next(stream)
                print(f"[{task}] {problem.instruction}\n{problem.output}\n")
        return
    if args.output_dir is None:
        parser.error("give --output_dir FOLDER, or --show N to look at some problems")
    for part, samples in (("train", args.samples), ("held_out", args.held_out_samples)):
        streams = {task: problems(task, args.seed, held_out=part == "held_out") for task in args.turns}
        folder = args.output_dir / part
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "problems.jsonl", "w", encoding="utf-8") as out:
            for i in range(samples):
                problem = next(streams[args.turns[i % len(args.turns)]])
                out.write(json.dumps({"instruction": problem.instruction, "input": None, "output": problem.output}) + "\n")
    made = {"samples": args.samples, "seed": args.seed, "turns": args.turns}
    (args.output_dir / "made.json").write_text(json.dumps(made) + "\n", encoding="utf-8")  # last: the files are complete


if __name__ == "__main__":
    main()
