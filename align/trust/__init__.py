"""How far to trust the label and how far the margin, measured on the user's own data before training.

    pairs + margins --> calibrate (slope b) --.
    frozen features --> proxy (linear policies) --> held-out labels --> choose (t, g) --> sentences, JSON, plot
                          evidence (sizes of the errors, flip rate) --'

Legend of the package: N pairs, D feature directions, S settings of a loss (trust, strength, prior), all at once.
"""
