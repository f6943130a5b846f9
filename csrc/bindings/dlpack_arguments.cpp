#include "bindings/dlpack_arguments.hpp"

#include "base/errors.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

/// DLPack's stable structures, as https://dmlc.github.io/dlpack lays them down (before version 1.0, which is
/// what exporters give to callers that name no version).
struct DlDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t num_dims;
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // null where contiguous
  std::uint64_t byte_offset;
};
constexpr std::int32_t kCuda = 2;
constexpr int kNoStreamOrder = -1;  // the caller passes the stream that its tensors were made on

char kind_of(std::uint8_t code) {
  constexpr char kKinds[] = {'i', 'u', 'f', '?', 'b', '?', 'u'};
  return code < sizeof kKinds ? kKinds[code] : '?';
}

std::string type_name_of(char kind, int bits) {
  const std::string width = std::to_string(bits);
  switch (kind) {
    case 'f':
      return "float" + width;
    case 'b':
      return "bfloat" + width;
    case 'i':
      return "int" + width;
    case 'u':
      return "uint" + width;
    default:
      return "another type of " + width + " bits";
  }
}

std::string shape_name(const std::vector<std::int64_t>& shape) {
  std::string name;
  for (const std::int64_t n : shape) name.append(name.empty() ? "(" : ", ").append(std::to_string(n));
  return name.append(shape.empty() ? "()" : ")");
}

bool is_contiguous(const DeviceArray& array) {
  std::int64_t expected = 1;
  for (std::size_t i = array.shape.size(); i-- > 0;) {
    if (array.shape[i] != 1 && array.strides[i] != expected) return array.size() == 0;
    expected *= array.shape[i];
  }
  return true;
}

}  // namespace

std::int64_t DeviceArray::size() const {
  std::int64_t product = 1;
  for (const std::int64_t n : shape) product *= n;
  return product;
}

std::string DeviceArray::type_name() const { return type_name_of(kind, bits); }

void DeviceArguments::fail(const std::string& message) const {
  throw InvalidArgument(std::string(function_) + ": " + message);
}

DeviceArray DeviceArguments::array(const py::object& object, const char* argument) {
  if (!py::hasattr(object, "__dlpack__")) {
    fail(std::string(argument) + " is a " + std::string(py::str(py::type::of(object).attr("__name__"))) +
         ", expected a tensor");
  }
  const py::object capsule = object.attr("__dlpack__")(py::arg("stream") = kNoStreamOrder);
  auto* tensor = static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (tensor == nullptr) throw py::error_already_set();
  held_.push_back(capsule);
  const auto num_dims = static_cast<std::size_t>(tensor->num_dims);
  DeviceArray array{static_cast<char*>(tensor->data) + tensor->byte_offset,
                    {tensor->shape, tensor->shape + num_dims},
                    std::vector<std::int64_t>(num_dims),
                    tensor->lanes == 1 ? kind_of(tensor->code) : '?',
                    tensor->bits,
                    tensor->device.type == kCuda ? tensor->device.id : -1};
  std::int64_t product = 1;
  for (std::size_t i = num_dims; i-- > 0;) {
    array.strides[i] = tensor->strides != nullptr ? tensor->strides[i] : product;
    product *= array.shape[i];
  }
  places_.push_back({argument, array.device});
  return array;
}

DeviceArray DeviceArguments::flat(const py::object& object, const char* argument, char kind, int bits,
                                  std::int64_t size) {
  DeviceArray found = array(object, argument);
  if (found.kind != kind || found.bits != bits) {
    fail(std::string(argument) + " is " + found.type_name() + ", expected " + type_name_of(kind, bits));
  }
  if (found.shape.size() != 1 || !is_contiguous(found) || (size >= 0 && found.shape[0] != size)) {
    fail(std::string(argument) + " has shape " + shape_name(found.shape) + ", expected (" +
         (size >= 0 ? std::to_string(size) : std::string("any number")) + ",), contiguous");
  }
  return found;
}

float* DeviceArguments::facts(const py::object& object, const char* argument, std::int64_t rows,
                              std::int64_t columns) {
  const DeviceArray found = array(object, argument);
  if (found.kind != 'f' || found.bits != 32 || found.shape != std::vector{rows, columns} ||
      !is_contiguous(found)) {
    fail(std::string(argument) + " is " + found.type_name() + " " + shape_name(found.shape) +
         ", expected float32 " + shape_name({rows, columns}) + ", contiguous");
  }
  return static_cast<float*>(found.data);
}

void DeviceArguments::check_aligned(const DeviceArray& tensor, const char* argument) const {
  if (tensor.size() == 0) return;
  const std::int64_t element = tensor.bits / 8;
  bool aligned = reinterpret_cast<std::uintptr_t>(tensor.data) % cuda::kVectorBytes == 0;
  for (std::size_t i = 0; i < 2; ++i) {
    aligned = aligned && (tensor.shape[i] == 1 || tensor.strides[i] * element % cuda::kVectorBytes == 0);
  }
  if (!aligned || (tensor.shape[2] > 1 && tensor.strides[2] != 1)) {
    fail(std::string(argument) + ": rows of " + std::to_string(tensor.shape[2]) +
         " must be contiguous and begin at multiples of " + std::to_string(cuda::kVectorBytes) + " bytes");
  }
}

cuda::GraphTensor DeviceArguments::heads(const py::object& object, const char* argument) {
  const DeviceArray found = array(object, argument);
  if (found.shape.size() != 3) {
    fail(std::string(argument) + " has shape " + shape_name(found.shape) +
         ", expected (tokens, heads, head_dim)");
  }
  const bool is_16 = found.bits == 16 && (found.kind == 'f' || found.kind == 'b');
  if (!is_16 && (found.bits != 32 || found.kind != 'f')) {
    fail(std::string(argument) + " is " + found.type_name() + ", expected float32, float16 or bfloat16");
  }
  const auto storage = !is_16              ? cuda::Storage::f32
                       : found.kind == 'f' ? cuda::Storage::f16
                                           : cuda::Storage::bf16;
  if (shape_.num_tokens < 0) {
    const std::int64_t vector = cuda::kVectorBytes * 8 / found.bits;
    if (found.shape[2] < 1 || found.shape[2] > cuda::kMaxHeadDim || found.shape[2] % vector != 0) {
      fail(std::string(argument) + " has head_dim " + std::to_string(found.shape[2]) +
           ", expected a multiple of " + std::to_string(vector) + " up to " +
           std::to_string(cuda::kMaxHeadDim));
    }
    if (found.shape[1] > cuda::kMaxHeads) {
      fail(std::string(argument) + " has " + std::to_string(found.shape[1]) + " heads, expected at most " +
           std::to_string(cuda::kMaxHeads));
    }
    shape_ = {found.shape[0], found.shape[1], static_cast<int>(found.shape[2]), storage, 0.0f};
  }
  if (found.shape != std::vector<std::int64_t>{shape_.num_tokens, shape_.num_heads, shape_.head_dim} ||
      storage != shape_.storage) {
    fail(std::string(argument) + " is " + found.type_name() + " " + shape_name(found.shape) + ", expected " +
         shape_name({shape_.num_tokens, shape_.num_heads, shape_.head_dim}) + " of the first tensor's type");
  }
  check_aligned(found, argument);
  return {found.data, found.strides[0], found.strides[1]};
}

int DeviceArguments::device() const {
  const int first = places_.front().device;
  for (const Place& place : places_) {
    if (place.device == first && first >= 0) continue;
    const std::string found =
        place.device < 0 ? "not in a GPU's memory" : "on cuda:" + std::to_string(place.device);
    const std::string wanted =
        first < 0 ? "a CUDA device" : "cuda:" + std::to_string(first) + " as " + places_.front().argument;
    fail(place.argument + " is " + found + ", expected " + wanted);
  }
  return first;
}

}  // namespace scfm
