"""Turn files into batches, in numbered stages; each module imports only from those above it.

     stage     module           output
     -         bad_rows         `BadRow`: the error of a row that cannot be used, counted by its kind
     -         control_tokens   messages in which no typed word is a control token
     -         pictures         an RGB picture of encoded bytes or of a file in the data's folder; augmentation
     1         files            stored rows of parquet, JSON, webdataset and Hub sources, as a table or one by one
     2         schemas          `{"images": [...], "messages": [...]}` of a row, whatever layout its data set has
     3         rows             `Rows`, all sources as one list of samples, filtered; or streams that are read in order
     4         encoder          token ids, labels and pixel values of a sample
     5         dataset          encoded rows by (epoch, row numbers); a bad row is reported and replaced
     3 and 5   composed         the same of rows that a module composes during training
     6         plans            row numbers of each batch: rows of similar length, or packs that rows fill
     7         collators        tensors of a micro-batch: rows padded to one length, or one after another
     -         options          `DataArgs`: the options of all stages
     5 to 7    streaming        micro-batches, too, but of data that is never held as a whole
     -         features         features of a frozen vision tower, kept on disk, in the place of pixel values
     8         loader           the micro-batches of one rank, as the options say

`preview` and `preview_page` show the output of stages 1 to 4 for a data set. Labels come from the chat template.
Whatever is random depends on the seed, the epoch and the row, so a resumed run sees what it would have seen.
"""
