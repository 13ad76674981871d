"""``flexolmo compare``: one YAML file, and every method of the comparison is trained, evaluated and put into one table.

    config.py    the file           settings.py  named settings of owners' runs, and the ablations
    plan.py      the steps, in order, with what each is made of
    check.py     whether held-out files and tools are as they must be
    work.py      what each step does           steps.py     running, skipping and recording steps
    budget.py    tokens and FLOPs of training runs
    scores.py    all methods on all texts, of one seed
    table.py     the table over all seeds      figures.py   the pictures
"""
