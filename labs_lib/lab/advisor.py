"""A form over `advise`: turn the constraints, see who is left. Without widgets the first answer stays, as a table."""

from labs_lib.measure.advice import Constraints, Method, advise, read_methods


def advisor(methods: "dict[str, Method] | None" = None) -> None:
    """Show advice without constraints, and in a live notebook a form that asks again with yours."""
    methods = read_methods() if methods is None else methods
    try:
        import ipywidgets as widgets
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(advise(Constraints(), methods))
        return
    if get_ipython() is None:
        print(advise(Constraints(), methods))
        return
    first = next(iter(methods.values()))
    wide = {"style": {"description_width": "12em"}, "layout": widgets.Layout(width="32em")}
    sizes = [("any", None), *((f"{n:,}", n) for n in (1_000, 2_500, 20_000, 80_000, first.base))]
    shares = [("any", None), *((f"{n} %", n / 100) for n in (40, 50, 60, 75))]
    fields = {
        "task": widgets.Dropdown(
            options=[("mean over all", None), *((t, t) for t in first.scores)], description="task", **wide
        ),
        "trained": widgets.Dropdown(options=sizes, description="trained numbers, at most", **wide),
        "memory": widgets.Dropdown(options=shares, description="training memory, at most", **wide),
        "overhead": widgets.Dropdown(
            options=[("any", None), ("none, once merged", 0.0), ("10 %", 0.1)],
            description="FLOPs more per request",
            **wide,
        ),
        "mixed_batch": widgets.Dropdown(
            options=[("any", None), *((each, each) for each in first.engines)],
            description="mixed batch on",
            **wide,
        ),
        "kept": widgets.Dropdown(
            options=[("any", None), *((f"{n} %", float(n)) for n in (50, 75, 90))],
            description="old facts kept, at least",
            **wide,
        ),
        "parameters": widgets.Dropdown(
            options=[("as measured", None), ("1B", 1e9), ("7B", 7e9), ("70B", 7e10), ("over 100B", 2e11)],
            description="your model",
            **wide,
        ),
    }
    answer = widgets.HTML()

    def ask(change=None) -> None:
        answer.value = advise(
            Constraints(**{k: field.value for k, field in fields.items()}), methods
        )._repr_html_()

    for field in fields.values():
        field.observe(ask, "value")
    ask()
    display(widgets.VBox([*fields.values(), answer]))
    display(advise(Constraints(), methods))  # what a page without a kernel shows
