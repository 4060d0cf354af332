"""Print what the equivalence table covers: python -m tests.rows

It prints the sizes and dtypes of the rows of each preset (those of `make test`, and in brackets those that
`make test-all` adds), the planted bugs, and how many pairs the pairwise table covers.
"""

from collections import defaultdict

from tests.rows import QUICK_ROWS, ROWS, SLOW_ROWS, deepspeed, pairwise


def main() -> None:
    fast, added = [*QUICK_ROWS, *deepspeed.ROWS], [row for row in ROWS if row not in QUICK_ROWS]
    slow = [*added, *SLOW_ROWS, *deepspeed.SLOW_ROWS]
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for when, rows in (("fast", fast), ("slow", slow)):
        for row in (row for row in rows if not row.bug):
            dtype = next(word for word in row.options if word.startswith("precision=")).removeprefix("precision=")
            found[row.strategy[0].removeprefix("strategy=")][when].add(f"{dtype} x{row.size}")
    for preset, kinds in sorted(found.items()):
        more = sorted(kinds["slow"] - kinds["fast"])
        print(f"{preset:<10} {', '.join(sorted(kinds['fast']))}" + (f" ({', '.join(more)})" if more else ""))
    bugs = [row for row in [*fast, *slow] if row.bug]
    table = [tuple(line.split()) for line in pairwise.TABLE.strip().splitlines()]
    covered = set().union(*map(pairwise.pairs, table))
    print(f"{len(fast)} rows, {len(slow)} more in make test-all; {len(bugs)} planted bugs in the table")
    print(f"pairwise: {len(covered)} pairs of {len(pairwise.all_pairs())} in {len(table)} rows")


if __name__ == "__main__":
    main()
