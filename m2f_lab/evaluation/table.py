"""Figures of an evaluation as text."""

_HEADERS = {"IoU": "IoU %", "accuracy": "accuracy %", "share": "pixels %"}


def format_table(result: dict) -> str:
    """The result of an evaluation as text: one line per class, then the figures of all. "–" where there is none."""
    width = max(len("class"), *(len(c["name"]) for c in result["classes"]))
    columns = [name for name in result["classes"][0] if name != "name"]

    def cell(value: float | None) -> str:
        return f"{'–' if value is None else value if isinstance(value, int) else format(value, '.2f'):>12}"

    def header(name: str) -> str:
        whole = all(isinstance(c[name], int) for c in result["classes"])
        return f"{_HEADERS.get(name, name if whole else f'{name} %'):>12}"

    lines = [f"{'class':<{width}}" + "".join(map(header, columns))]
    lines += [f"{c['name']:<{width}}" + "".join(cell(c[name]) for name in columns) for c in result["classes"]]
    figures = {name: value for name, value in result.items() if name not in ("num_images", "classes")}
    texts = [f"{name} –" if value is None else f"{name} {value:.2f} %" for name, value in figures.items()]
    return "\n".join(
        [*lines, "─" * (width + 12 * len(columns)), f"{'   '.join(texts)}   ({result['num_images']} images)"]
    )
