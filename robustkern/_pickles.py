"""Inspects a pickle before it is loaded: even a small one may build objects of any size."""

import pickletools

_IN_PLACE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


def check_pickle(content: bytes, most: int) -> set[str]:
    """The names that a pickle imports by GLOBAL instructions, each as "module name".

    Args:
        content: A pickle.
        most: How many instructions and memo entries it may have. What it builds may have ten times as many elements,
            counted each time a traversal reaches one: a tuple that holds a tuple twice, and so on forty levels deep,
            takes years to hash, and so does a smaller one that is the key of many mappings.

    Raises:
        ValueError: It is not a pickle, or exceeds these limits.
    """
    stack: list[list[int] | None] = []  # each object's size, in a list that all references to it share; None: a mark
    memo: dict[int, list[int]] = {}
    imported: set[str] = set()
    total = 0
    for count, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        name, place = instruction.name, 0
        if name == "GLOBAL":
            imported.add(str(argument))
        if name == "MEMOIZE" or name.endswith("PUT"):
            place = len(memo) if argument is None else int(argument)
            memo[place] = _top(stack)
        elif name.endswith("GET"):
            place = int(argument or 0)
            stack.append(memo.get(place, [1]))
        elif name == "MARK":
            stack.append(None)
        elif name == "DUP":
            stack.append(_top(stack))
        else:
            taken = []
            for needed in reversed(instruction.stack_before):
                if needed is pickletools.stackslice:
                    while stack and stack[-1] is not None:
                        taken.append(stack.pop())
                elif stack:
                    taken.append(stack.pop())
            sizes = [size for size in reversed(taken) if size is not None]
            made = sizes[0] if name in _IN_PLACE and sizes else [1]
            added = sum(size[0] for size in sizes if size is not made)
            made[0] += added
            total += added
            stack += [made] * len(instruction.stack_after)
            if total > 10 * most:
                raise ValueError(f"it makes more than {10 * most} objects")
        if count > most or place > most:
            raise ValueError(f"more than {most} instructions")
    return imported


def _top(stack: list[list[int] | None]) -> list[int]:
    return next((size for size in reversed(stack) if size is not None), [1])
