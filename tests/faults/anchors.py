"""Where a fault goes: found by function and expression, so that a new name or layout keeps it."""

import ast
import re


class Missing(Exception):
    """The place of a fault is not there, or is there more than once."""


def break_source(source: str, name: str, replace: str, instead: str) -> str:
    """The text of a file with a fault in it.

    `name` is a function, in which the code `replace` is found by its syntax tree; or a constant,
    in whose text `replace` stands once, or which is replaced whole; or "" for the text of the file.
    """
    if not name:
        return substitute(source, replace, instead)
    node: ast.AST = find(ast.parse(source), name)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        node, instead = find_code(node, replace, instead)
    elif not replace:
        node = getattr(node, "value", node)
    else:
        instead = substitute(ast.get_source_segment(source, node) or "", replace, instead)
    lines = source.encode().splitlines(keepends=True)  # columns are counted in bytes
    start, end = (
        sum(map(len, lines[: getattr(node, f"{prefix}lineno") - 1]))
        + getattr(node, f"{prefix}col_offset")
        for prefix in ("", "end_")
    )
    text = b"".join(lines)
    return (text[:start] + instead.encode() + text[end:]).decode()


def substitute(text: str, replace: str, instead: str) -> str:
    if (times := text.count(replace)) != 1:
        raise Missing(f"stands there {times} times")
    return text.replace(replace, instead)


def find(tree: ast.AST, name: str) -> ast.AST:
    """The function or assignment of a qualified name, as Class.method."""
    for part in name.split("."):
        for node in ast.walk(tree):  # the outermost first
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            names = {n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)}
            assigns = isinstance(node, ast.Assign | ast.AnnAssign) and part in names
            if node is not tree and (assigns or getattr(node, "name", None) == part):
                tree = node
                break
        else:
            raise Missing(f"no {part}")
    return tree


def find_code(function: ast.AST, replace: str, instead: str) -> tuple[ast.AST, str]:
    """The one node that is the code `replace`, and what to put there in the code's local names."""
    (pattern,) = ast.parse(replace).body
    wanted = pattern.value if isinstance(pattern, ast.Expr) else pattern
    nodes = list(ast.walk(function))
    local = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    local |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    for variable in (set[str](), local):  # by its names first, then whatever the local ones are
        tried = [(node, dict[str, str]()) for node in nodes]
        found = [(node, names) for node, names in tried if same(wanted, node, variable, names)]
        if len(found) == 1:
            node, names = found[0]
            return node, renamed(instead, names)
        if found:
            break
    raise Missing(f"stands there {len(found)} times")


def same(wanted: ast.AST, node: ast.AST, local: set[str], names: dict[str, str]) -> bool:
    """Whether two trees are equal but for local names, each of which stands for one of `names`."""
    if type(wanted) is not type(node):
        return False
    if isinstance(wanted, ast.Name) and isinstance(node, ast.Name) and node.id in local:
        return names.setdefault(wanted.id, node.id) == node.id
    both = [pairs(getattr(wanted, field), getattr(node, field)) for field in wanted._fields]
    return all(equal(mine, its, local, names) for each in both for mine, its in each)


def equal(mine: object, its: object, local: set[str], names: dict[str, str]) -> bool:
    if isinstance(mine, ast.AST) and isinstance(its, ast.AST):
        return same(mine, its, local, names)
    return mine == its


def pairs(mine: object, its: object) -> list[tuple[object, object]]:
    """Two fields of a node, element by element where they are lists of one length."""
    if isinstance(mine, list) and isinstance(its, list) and len(mine) == len(its):
        return list(zip(mine, its, strict=True))
    return [(mine, its)]


def renamed(code: str, names: dict[str, str]) -> str:
    """Code in other names; an expression in parentheses, as it may land in another one."""
    text = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), code)
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return text
    return f"({text})"
