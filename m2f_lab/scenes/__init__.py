"""Drawn streets and rooms with exact labels, in the layouts of Cityscapes and ADE20K: practice data without a licence.

They let readers, transforms, training and notebooks run on a machine without a data set. They use the real class ids,
and the real readers read them. No other part of the library imports this one.

    python -m m2f_lab.scenes data/scenes      # 200 streets and 200 rooms, and a quarter as many to validate on

Every scene is made of flat colours seen through one camera and painted from far to near, twice: into the picture and
into a map of objects. The two therefore agree at every pixel, whatever covers what. `stage` holds paper, camera and
light, `street` and `room` compose the scenes, `writing` stores them.
"""

from m2f_lab.scenes.writing import Scene, draw_room, draw_street, render_sample, write_ade20k, write_cityscapes

__all__ = ["Scene", "draw_room", "draw_street", "render_sample", "write_ade20k", "write_cityscapes"]
