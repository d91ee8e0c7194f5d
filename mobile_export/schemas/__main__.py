"""`python -m mobile_export.schemas`: write the committed schemas anew."""

from mobile_export import schemas
from mobile_export.files import write_file

for path, text in schemas.files().items():
    write_file(path, text)
