"""What a benchmark draws has axes that say what they are of, and in what unit."""


def check(module, summary):
    """Draws the summary; returns the labels of what is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    module.draw(axes, summary)
    figure.canvas.draw()
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    names = [axes.get_xlabel(), axes.get_ylabel()]
    assert any("percent" in name for name in names)
    # Names at the ticks of an axis are its label.
    assert all(names) or any(text.strip("−.0123456789") for text in ticks)
    for other in figure.axes:
        assert other.get_ylabel() or other is axes
    labels = axes.get_legend_handles_labels()[1] or ticks
    pyplot.close(figure)
    return labels
