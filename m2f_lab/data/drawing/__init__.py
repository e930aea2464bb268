"""How the scenes of `m2f_lab.data.scenes` are drawn: paper and light (`stage`), then the things that stand on it.

Everything is a flat colour seen through one camera and painted from far to near, twice over: once into the
picture and once into a map of objects. The two therefore agree at every pixel, whatever covers what.
"""
