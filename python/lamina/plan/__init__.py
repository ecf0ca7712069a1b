"""Plans: a whole model as one list of calls of compiled functions.

    recording  what a run of a captured graph called (record), with torch's own ops done by lamina's (lowering)
    program    segments of steps with their memory laid out (memory), and calls of torch between them
    plan       a program with names for what goes in and comes out (model): called, saved (file), looked at (describe)

`torch.compile(model, backend="lamina")` and `accelerate` run their graphs as programs where that is faster;
`lamina.make_plan` gives one to keep.
"""
